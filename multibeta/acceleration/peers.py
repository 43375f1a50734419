"""Models of diffusers from disk, and random inputs for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from multibeta.files import read_json


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that diffusers saved in `folder`, for inference.

    Raises:
        ValueError: For a folder without a model's config.json.
        ModuleNotFoundError: Without diffusers.
    """
    config = Path(folder) / "config.json"
    if not config.exists():
        parts = sorted(path.parent.name for path in Path(folder).glob("*/config.json"))
        hint = f"; name one of its parts: {', '.join(parts)}" if parts else ""
        raise ValueError(f"{folder} holds no config.json of a diffusers model{hint}")
    name = read_json(config).get("_class_name")
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{folder} is read by diffusers, which is not installed: pip install diffusers") from error
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{config} names the class {name!r}, which diffusers {diffusers.__version__} does not have")
    return kind.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False).eval().requires_grad_(False)


def random_inputs(model: nn.Module, *, batch: int = 1, size: int | None = None) -> dict[str, object]:
    """Random arguments for a model of diffusers, as its configuration describes them.

    Args:
        model: UNet2DModel, UNet2DConditionModel or AutoencoderKL; `ValueError` for others.
        size: Height and width of the sample; by default that of the configuration.
    """
    kind, config = type(model).__name__, model.config
    if kind not in ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"):
        raise ValueError(f"no inputs are known for a {kind}: call multibeta.acceleration.check with some of your own")
    size = size or config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)

    inputs: dict[str, object] = {"sample": draw(config.in_channels, height, width)}
    if kind == "AutoencoderKL":
        return inputs
    inputs["timestep"] = 500
    if kind == "UNet2DConditionModel":
        inputs["encoder_hidden_states"] = draw(77, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":  # the larger Stable Diffusion
            ids = draw(6)
            features = config.projection_class_embeddings_input_dim - ids.shape[1] * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": draw(features), "time_ids": ids}
    return inputs
