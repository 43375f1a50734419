"""Images of a dataset or a generator, one batch at a time."""

import torch
from tqdm import tqdm


def image_batches(source, indices=None, batch_size=64, device="cpu", progress=True, label="images"):
    """Images from wherever they come, as float32 (n, C, H, W) in [-1, 1] on `device`, at most `batch_size` at a time.

    Args:
        source: A dataset, which gives `images(indices)`, uint8, and has a length; or tensors (n, C, H, W), uint8 or floats in
            [-1, 1], as a generator, a loader or a list of them.
        indices: Images of the dataset to take, in this order; by default all.
        label: What the progress bar says.

    Raises:
        ValueError: No images, indices without a dataset, or batches of other kinds or of several resolutions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    is_dataset = hasattr(source, "images")
    if is_dataset:
        indices = torch.arange(len(source)) if indices is None else indices
        batches = (source.images(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size))
    elif indices is not None:
        raise ValueError(f"indices need a dataset with images(indices), got {type(source).__name__}")
    else:
        batches = [source] if isinstance(source, torch.Tensor) else source
    shape, count = None, 0
    with tqdm(total=len(indices) if is_dataset else None, desc=label, unit="image", disable=not progress) as bar:
        for batch in batches:
            if not isinstance(batch, torch.Tensor) or batch.dim() != 4:
                kind = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
                raise ValueError(f"images must come as tensors (n, C, H, W), got {kind}")
            if batch.dtype != torch.uint8 and not batch.is_floating_point():
                raise ValueError(f"images must be uint8 or floating point in [-1, 1], got {batch.dtype}")
            shape = shape or batch.shape[1:]
            if batch.shape[1:] != shape:
                raise ValueError(f"images must share a shape, got {tuple(shape)} and {tuple(batch.shape[1:])}")
            for start in range(0, len(batch), batch_size):
                images = batch[start : start + batch_size].to(device)
                yield images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
                count += len(images)
                bar.update(len(images))
    if count == 0:
        raise ValueError("at least one image is needed, got none")
