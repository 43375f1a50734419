"""Faster forwards for models that people already have: the blocks of diffusers and latent-diffusion, served by `multibeta.ops`.

`accelerate` gives each block it knows a subclass of the block's own class that overrides `forward` alone; `restore` gives the
class back. Parameters, state dicts, hooks, isinstance and printing stay as they are, and copies and pickles are accelerated too.
Whatever a fast path does not serve, gradients on packed weights or a mask in attention, takes the forward the block came with,
and so does everything under `multibeta.backend("reference")`.

On the CPU, where no gradients are wanted, weights are packed for oneDNN, in about as much memory again, and follow the module's
own; `packing.packed` says how closely. Activations, and with them the result, lie channels-last.
"""

from multibeta.acceleration.check import TOLERANCES, Row, check, report, table
from multibeta.acceleration.diffusers import load, random_inputs
from multibeta.acceleration.swap import accelerate, restore

__all__ = ["TOLERANCES", "Row", "accelerate", "check", "load", "random_inputs", "report", "restore", "table"]
