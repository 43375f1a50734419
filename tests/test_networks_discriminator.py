import pytest
import torch
from torch import nn

from multibeta.networks import PatchDiscriminator


def by_the_specification():
    """PatchGAN as latent-diffusion describes it: n_layers 3, ndf 64, batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, 2, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.LeakyReLU(0.2),
        nn.Conv2d(256, 512, 4, 1, 1, bias=False),
        nn.BatchNorm2d(512),
        nn.LeakyReLU(0.2),
        nn.Conv2d(512, 1, 4, 1, 1),
    )


def test_it_is_the_published_network():
    torch.manual_seed(0)
    ours, theirs = PatchDiscriminator(norm="batch"), by_the_specification()
    theirs.load_state_dict({name.removeprefix("main."): value for name, value in ours.state_dict().items()})
    assert sum(parameter.numel() for parameter in ours.parameters()) == 2_765_633
    images = torch.randn(2, 3, 256, 256)
    logits = ours(images)
    assert logits.shape == (2, 1, 30, 30)
    torch.testing.assert_close(logits, theirs(images))


def test_it_starts_as_published():
    torch.manual_seed(0)
    for norm in ("batch", "group"):
        network = PatchDiscriminator(norm=norm)
        assert network.main[8].weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert network.main[9].weight.mean().item() == pytest.approx(1, abs=0.005)
        assert network.main[9].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_by_groups_an_image_is_judged_alone():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    for norm, alone in (("group", True), ("batch", False)):
        network = PatchDiscriminator(base_channels=8, norm=norm)
        assert torch.allclose(network(images)[:1], network(images[:1]), atol=1e-6) == alone


@pytest.mark.parametrize("layers, resolution, side", [(3, 24, 1), (3, 32, 2), (3, 64, 6), (2, 32, 6), (1, 7, 1), (5, 100, 1)])
def test_the_smallest_images_give_a_logit(layers, resolution, side):
    network = PatchDiscriminator(base_channels=4, num_layers=layers)
    assert network(torch.zeros(1, 3, resolution, resolution)).shape == (1, 1, side, side)


@pytest.mark.parametrize("layers, pixels", [(3, 70), (2, 34), (1, 16)])
def test_a_logit_sees_so_many_pixels(layers, pixels):
    network = PatchDiscriminator(base_channels=4, num_layers=layers)
    for part in network.main:
        if isinstance(part, nn.GroupNorm):
            part.forward = lambda x: x  # which looks at the whole image
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == pixels


@pytest.mark.parametrize("layers, resolution, advice", [(3, 16, "at most 2"), (3, 5, "at least 6"), (4, 47, "at most 3")])
def test_images_that_are_too_small_say_what_fits(layers, resolution, advice):
    with pytest.raises(ValueError, match=rf"at least {3 * 2**layers} pixels, got .*{advice}"):
        PatchDiscriminator(base_channels=4, num_layers=layers)(torch.zeros(1, 3, resolution, resolution))


@pytest.mark.parametrize("field, value", [("base_channels", 3), ("num_layers", 0), ("norm", "layer"), ("image_channels", 1.5)])
def test_impossible_networks_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        PatchDiscriminator(**{field: value})
