"""Models of diffusers from disk, and random inputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from multibeta.interop import folders


class DiffusersModel(Protocol):
    """What is read of a model of diffusers."""

    config: Any
    device: torch.device
    dtype: torch.dtype


def load(folder: str | Path, dtype: torch.dtype = torch.float32, variant: str | None = None) -> nn.Module:
    """The model that diffusers saved in `folder`, on the CPU, in evaluation mode and without gradients.

    Args:
        dtype: Of its weights.
        variant: Of the weights, such as "fp16"; by default those without one, or the only ones there are.

    Raises:
        FileNotFoundError, ValueError: For a folder without a model of diffusers, or without these weights: what is there.
        ModuleNotFoundError: Without diffusers.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} holds no config.json of a diffusers model, it is no folder: name one that diffusers saved"
        )
    name = folders.model_class(folder)
    if name is None:
        parts = ", ".join(folders.models(folder))
        hint = f"name one of its parts: {parts}" if parts else f"it holds {folders.contents(folder)}"
        raise ValueError(f"{folder} holds no config.json of a diffusers model; {hint}")
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{folder} is read by diffusers, which is not installed: pip install diffusers") from error
    model_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if model_class is None:
        version = diffusers.__version__
        raise ValueError(f"{folder / 'config.json'} names the class {name!r}, which diffusers {version} does not have")
    variant, weights = folders.choose(folder, variant)
    chosen = {"variant": variant or None, "use_safetensors": ".safetensors" in weights.suffixes}
    return model_class.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False, **chosen).eval().requires_grad_(False)


def random_inputs(model: nn.Module, *, batch: int = 1, size: int | None = None) -> dict[str, object]:
    """Random keyword arguments for a model of diffusers, as its configuration describes them, on its device and in its dtype.

    Args:
        model: UNet2DModel, UNet2DConditionModel or AutoencoderKL.
        batch: Samples.
        size: Height and width of the sample, in pixels or latents; by default that of the configuration.

    Raises:
        ValueError: For a model of another class.
    """
    name = type(model).__name__
    if name not in ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"):
        raise ValueError(f"no inputs are known for a {name}: call multibeta.acceleration.check with some of your own")
    known = cast(DiffusersModel, model)
    config = known.config
    sample_size = size or config.sample_size or 64
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(known.device, known.dtype)

    inputs: dict[str, object] = {"sample": draw(config.in_channels, height, width)}
    if name == "AutoencoderKL":
        return inputs
    inputs["timestep"] = 500
    if name == "UNet2DConditionModel":
        inputs["encoder_hidden_states"] = draw(77, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":  # the larger Stable Diffusion
            ids = draw(6)
            features = config.projection_class_embeddings_input_dim - ids.shape[1] * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": draw(features), "time_ids": ids}
    return inputs
