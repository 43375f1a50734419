"""Features of images in the networks that the field measures with, from the user's own weight files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multibeta import distribution
from multibeta.data.dataset import Indices, is_dataset
from multibeta.metrics import inception, vgg
from multibeta.metrics.checks import ArrayLike, as_array, as_images
from multibeta.metrics.statistics import FeatureStatistics
from multibeta.metrics.streaming import Images, image_batches
from multibeta.weights import assign, open_script, read_weights, weights_hash

Network = Callable[[Tensor], ArrayLike]
"""Images (n, C, H, W) in [-1, 1] to features (n, d); a `FeatureNetwork` also says what its features depend on."""

NETWORKS = ("inception", "vgg16")
INCEPTION_FITS = (
    "pt_inception-2015-12-05-6726825d.pth (pytorch-fid) or weights-inception-2015-12-05-6726825d.pth (torch-fidelity), 91 MiB; "
    "with torchscript=True also inception-2015-12-05.pt (NVIDIA)"
)
VGG16_FITS = "vgg16-397923af.pth (torchvision), 528 MiB; with torchscript=True also vgg16.pt (NVIDIA)"


class FeatureNetwork(nn.Module):
    """A frozen network as a function from images (N, 3, H, W) in [-1, 1] to features (N, d) in float32.

    It stays in evaluation mode and computes in float32 also under autocast; whether a GPU may use TF32 is torch's switch.
    Images go through it as one batch.

    Args:
        network: Bytes as floats, after `resize`, to features.
        resize: Images in [0, 255] to what `network` reads.
        name, preprocessing, weights_hash: What a number measured in these features depends on; state them with it.
        dimension: d.
    """

    def __init__(
        self,
        network: nn.Module,
        resize: Callable[[Tensor], Tensor],
        *,
        name: str,
        preprocessing: str,
        weights_hash: str,
        dimension: int,
    ):
        super().__init__()
        self.network, self.resize = network, resize
        self.name, self.preprocessing, self.weights_hash = name, preprocessing, weights_hash
        self.dimension = dimension
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode: batch statistics would make features depend on the batch."""
        return super().train(False)

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        """Features (N, d) of a tensor or array of images; `ValueError` for what is none in [-1, 1], see `checks.as_images`."""
        return self.of_checked(as_images(images, channels=3))

    @torch.no_grad()
    def of_checked(self, images: Tensor | np.ndarray) -> Tensor:
        """The same without a word on a batch in which no pixel is negative: whoever reads many batches knows of the others."""
        images = to_bytes(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.network(self.resize(images)).float()

    @property
    def origin(self) -> dict[str, Any]:
        """The dict to store with a result."""
        return {"features": self.name, "preprocessing": self.preprocessing, "weights_hash": self.weights_hash}


def extract_features(
    network: Network,
    source: Images,
    indices: Indices | None = None,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    shared: bool = False,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Features of many images, read and measured batch by batch; `extract_statistics` where they would not fit into memory.

    Args:
        network: A `FeatureNetwork` on `device`, or any function from images (n, C, H, W) in [-1, 1] to features (n, d).
        source: A dataset, which gives `images(indices)`, uint8, and has a length; or tensors or arrays (n, C, H, W), uint8 or
            floats in [-1, 1], one or a generator, a loader or a list of them.
        indices: Images of the dataset to take; by default all.
        shared: Whether several processes do this together (`distribution`): each measures its turns of the batches of a dataset,
            and of batches those that it is given, its turns likewise. All get the same features, those of one process.

    Returns:
        (features, origin): array (N, d), and the dictionary to store with a result: `num_images`, `resolution` and what the
        network knows of itself, of a `FeatureNetwork` its name, preprocessing and hash of the weights.

    Raises:
        ValueError: No images, images of several resolutions or another range (see `streaming.image_batches`), features of
            another shape or that are not finite.

    Floats in [0, 1] in place of [-1, 1] are warned of: they are other pictures, darker ones of half the contrast.
    """
    origin = {}
    parts = list(_feature_batches(network, source, indices, batch_size, device, progress, origin, shared))
    return np.concatenate(parts), origin


def extract_statistics(
    network: Network,
    source: Images,
    indices: Indices | None = None,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    shared: bool = False,
) -> FeatureStatistics:
    """Mean and covariance of the features of many images, whose number memory does not depend on; see `extract_features`.

    Returns:
        `FeatureStatistics`, whose `origin` says what they depend on.
    """
    statistics = FeatureStatistics()
    for features in _feature_batches(network, source, indices, batch_size, device, progress, statistics.origin, shared):
        statistics.update(features)
    return statistics


def _feature_batches(
    network: Network,
    source: Images,
    indices: Indices | None,
    batch_size: int,
    device: str | torch.device,
    progress: bool,
    origin: dict[str, Any],
    shared: bool,
) -> Iterator[np.ndarray]:
    """Features of every batch, (n, d); fills `origin` on the way."""
    origin.update(getattr(network, "origin", {}), num_images=0)
    if shared and is_dataset(source):
        every = torch.arange(len(source)) if indices is None else torch.as_tensor(indices)
        indices = torch.cat([every[:0], *distribution.world().turns(every.split(batch_size))])
    images = image_batches(source, indices, batch_size, device, progress, "features", least=0 if shared else 1)
    own = _measured(network, images, origin)
    for features in distribution.in_turn(own) if shared else own:
        origin["num_images"] += len(features)
        yield features
    if not origin["num_images"]:
        raise ValueError("at least one image is needed, got none")


@torch.no_grad()
def _measured(network: Network, batches: Iterator[Tensor], origin: dict[str, Any]) -> Iterator[np.ndarray]:
    """Features (n, d) of batches of images, whose resolution is added to `origin`."""
    measure = getattr(network, "of_checked", network)
    for images in batches:
        features = as_array(measure(images), "features")
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"features must be (n, d) for n images, got shape {features.shape} for {len(images)}")
        origin["resolution"] = tuple(images.shape[2:])
        yield features


def load_features(
    path: str | Path, network: str = "inception", *, preprocessing: str | None = None, torchscript: bool = False
) -> FeatureNetwork:
    """A feature network from a weight file of the user's; nothing is downloaded and no foreign class is unpickled.

    Args:
        path: The file; its content tells safetensors, `torch.save` and TorchScript apart, whatever it is called.
        network: "inception", the 2048 pooled features of FID, or "vgg16", the 4096 of precision and recall.
        preprocessing: "tensorflow" (default): bytes, resized as TensorFlow 1 did, as in torch-fidelity, NVIDIA's code and the
            original FID. "pytorch-fid", for Inception: resized about pixel centres, by a slightly different scale. At 64 pixels
            features differ by about a percent, so numbers of the two must not be mixed.
        torchscript: Open the file as a TorchScript archive. An archive is a program and may do what you may do: for files
            from a source you trust. From NVIDIA's `inception-2015-12-05.pt` only the tensors are taken; `vgg16.pt` itself
            is called, since how it scales images is part of the program.

    Returns:
        A `FeatureNetwork` on the CPU.

    Raises:
        FileNotFoundError: No file is there.
        ValueError: The file is damaged, holds more than tensors, or fits another network; the message names what fits.
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    allowed = ("tensorflow", "pytorch-fid") if network == "inception" else ("tensorflow",)
    if preprocessing not in (None, *allowed):
        raise ValueError(f"preprocessing of {network} must be one of {', '.join(allowed)}, got {preprocessing!r}")
    if network == "inception":
        return _load_inception(path, preprocessing or "tensorflow", torchscript)
    return _load_vgg16_script(path) if torchscript else _load_vgg16(path)


def _load_inception(path: str | Path, preprocessing: str, torchscript: bool) -> FeatureNetwork:
    state = inception.from_other_names(read_weights(path, torchscript=torchscript))
    with torch.device("meta"):
        network = inception.FIDInception()
    assign(network, state, path, "the FID Inception", INCEPTION_FITS)
    resize, description = {
        "tensorflow": (_for_inception, "bytes, TensorFlow 1 bilinear to 299 x 299, (x - 128) / 128"),
        "pytorch-fid": (_for_pytorch_fid, "bytes, half-pixel bilinear to 299 x 299, x / 127.5 - 1"),
    }[preprocessing]
    return FeatureNetwork(
        network,
        resize,
        name="FID Inception 2015-12-05, pooled",
        preprocessing=description,
        weights_hash=weights_hash(network.state_dict()),
        dimension=inception.DIMENSION,
    )


def _load_vgg16(path: str | Path) -> FeatureNetwork:
    state = vgg.from_other_names(read_weights(path))
    with torch.device("meta"):
        network = vgg.VGG16()
    assign(network, state, path, "VGG16", VGG16_FITS)
    return FeatureNetwork(
        network,
        _for_vgg16,
        name="VGG16 fc2 after ReLU",
        preprocessing="bytes, TensorFlow 1 bilinear to 224 x 224, (x / 255 - mean) / deviation of ImageNet",
        weights_hash=weights_hash(network.state_dict()),
        dimension=vgg.DIMENSION,
    )


def _load_vgg16_script(path: str | Path) -> FeatureNetwork:
    script = open_script(path)
    return FeatureNetwork(
        _Script(script),
        nn.Identity(),
        name="VGG16 fc2, TorchScript",
        preprocessing="bytes, then the script's own",
        weights_hash=weights_hash(script.state_dict()),
        dimension=vgg.DIMENSION,
    )


class _Script(nn.Module):
    def __init__(self, script: torch.jit.ScriptModule):
        super().__init__()
        self.script = script

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        return self.script(images, return_features=True)


def _for_inception(images: Tensor) -> Tensor:
    return (resize_tensorflow1(images, inception.RESOLUTION) - 128) / 128


def _for_pytorch_fid(images: Tensor) -> Tensor:
    size = (inception.RESOLUTION, inception.RESOLUTION)
    return nn.functional.interpolate(images / 255, size=size, mode="bilinear", align_corners=False) * 2 - 1


def _for_vgg16(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(value, device=images.device).view(3, 1, 1) * 255 for value in (vgg.MEAN, vgg.DEVIATION))
    return (resize_tensorflow1(images, vgg.RESOLUTION) - mean) / deviation


def to_bytes(images: Tensor | np.ndarray) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] rounded to bytes, as floats in [0, 255]: what a picture file would hold.

    Raises:
        ValueError: Another shape or dtype, or values that are no images in [-1, 1].
    """
    images = as_images(images, channels=3, warn=False)
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def resize_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize to (size, size) as TensorFlow 1 does it, which FID is defined with.

    Output pixel i samples the input at i * in / out, not at (i + 1/2) * in / out - 1/2 as about pixel centres: the picture
    shifts towards the bottom right. There is no antialiasing, and beyond the last pixel the edge repeats.
    """
    return _resize_axis(_resize_axis(images, size, 3), size, 2)


def _resize_axis(images: Tensor, size: int, axis: int) -> Tensor:
    length = images.shape[axis]
    # The scale is rounded to float32 first, as in TensorFlow.
    positions = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(length / size)
    low = positions.long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    weight = (positions - low).view(-1, *[1] * (3 - axis))
    start, end = images.index_select(axis, low), images.index_select(axis, high)
    return start + (end - start) * weight
