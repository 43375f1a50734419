"""Operations are counted as closed forms count them, once, and the log tells how many were made."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multibeta import data, training
from multibeta.recipes.recipe import build
from multibeta.training import TrainingOptions, operations
from multibeta.training.blockwise import set_forwards
from multibeta.training.operations import counted, peak_of
from tiny_recipes import tiny


class TwoConvs:
    """Two convolutions of 3 x 3 on images of 16 x 16, and nothing besides that counts."""

    def __init__(self):
        self.module = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 7, 3, stride=2, padding=1))

    def __call__(self, batch, generator):
        return self.module(batch.images).square().mean(), {}


FORWARD = 2 * 9 * (3 * 5 * 16**2 + 5 * 7 * 8**2)  # 2 for a multiplication and addition
BACKWARD = 2 * 9 * (3 * 5 * 16**2 + 2 * 5 * 7 * 8**2)  # by weights, and by what is no image


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_log_tells_the_operations_of_an_image(pieces, tmp_path):
    options = TrainingOptions(steps=2, batch_size=7, accumulate=pieces, precision="fp32", log_every=1)
    images = data.Subset(data.Scenes(16), range(8))
    training.train(TwoConvs(), images, options, tmp_path, progress=False)
    for record in training.read_metrics(tmp_path):
        assert record["flops_per_second"] == pytest.approx((FORWARD + BACKWARD) * record["images_per_second"])
        assert "mfu" not in record  # of a CPU no peak is known


def test_of_a_known_gpu_the_log_tells_the_share_of_its_peak(tmp_path, monkeypatch):
    monkeypatch.setattr("multibeta.training.run.peak_of", lambda device, precision: 1e9)
    options = TrainingOptions(steps=1, batch_size=4, log_every=1)
    training.train(TwoConvs(), data.Subset(data.Scenes(16), range(8)), options, tmp_path, progress=False)
    (record,) = training.read_metrics(tmp_path)
    assert record["mfu"] == pytest.approx(record["flops_per_second"] / 1e9)


@pytest.mark.parametrize("way", ["compiled", "recomputed"])
def test_what_is_computed_again_or_compiled_counts_once(way):
    vae, _ = build(tiny())
    images, counts = torch.zeros(2, 3, 16, 16), []
    for ways in ({}, {way: True}):
        set_forwards(vae, **{"compiled": False, "recomputed": False} | ways)
        with counted() as counter:
            vae.decode(vae.encode(images, 0.5), 0.5).sum().backward()
        counts.append(counter.total)
    assert counts[0] == counts[1] > 0


def test_attention_on_the_cpu_counts_as_its_products():
    query, key, value = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 9, 9))
    with counted() as counter:
        result = F.scaled_dot_product_attention(query, key, value)
        assert counter.total == 2 * 2 * (2 * 3 * 5 * 9 * 8)
        result.sum().backward()
    assert counter.total == 7 * 2 * (2 * 3 * 5 * 9 * 8)


def test_peaks_of_gpus_by_their_names(monkeypatch):
    cuda, names = torch.device("cuda", 0), ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "Tesla T4"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert [peak_of(cuda, precision) for precision in ("bf16", "fp32")] == [989e12, 67e12]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert peak_of(cuda, "fp32") == 495e12
    found = []
    for name in names[1:]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found.append(peak_of(cuda, "bf16"))
    assert found == [756e12, 312e12, None] and peak_of(torch.device("cpu"), "bf16") is None
    assert operations.PEAKS.keys() == operations.TF32_PEAKS.keys()
