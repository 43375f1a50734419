"""Flow maps: the walk of a diffusion model's ODE as one function, for one to four evaluations."""

from multibeta.flow_map.network import MAP_SAMPLERS, FlowMap, FlowMapConfig, spread
from multibeta.flow_map.objective import FlowMapObjective, FlowMapObjectiveOptions
from multibeta.flow_map.trajectories import Starts, Trajectories, drawn_indices

__all__ = [
    "MAP_SAMPLERS",
    "FlowMap",
    "FlowMapConfig",
    "FlowMapObjective",
    "FlowMapObjectiveOptions",
    "Starts",
    "Trajectories",
    "drawn_indices",
    "spread",
]
