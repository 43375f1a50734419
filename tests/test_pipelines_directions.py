"""Directions of a model with names: what each kind is, and in which unit."""

import pytest
import torch

from multibeta import data, latents
from multibeta.pipelines import directions, named_directions
from multibeta.pipelines.display import traversals


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Stripes:
    """Forty images of noise, half of which have a stripe; no image is "blue", all are "small"."""

    resolution, channels, attribute_names = 16, 3, ("striped", "blue", "small")

    def __len__(self):
        return 40

    def images(self, indices):
        indices = torch.as_tensor(indices)
        pixels = torch.stack([rand(3, 16, 16, seed=int(index)) for index in indices])
        pixels[:, :, 6:10] += 4.0 * (indices % 2).view(-1, 1, 1, 1)
        return data.to_uint8((pixels / 8).clamp(-1, 1))

    def attributes(self, indices):
        striped = torch.as_tensor(indices) % 2 == 1
        return torch.stack([striped, torch.zeros_like(striped), torch.ones_like(striped)], 1)


def codes(model, beta):
    return model.encode(data.to_float(Stripes().images(range(40))), beta)


def test_principal_ones_are_named_by_their_share_of_the_variance(model):
    encodings = codes(model, 0.3)
    found, pca = named_directions(model, "principal", encodings, 0.3, 5), latents.principal_directions(encodings)
    assert found.steps.shape == (5, 4, 8, 8) and (found.beta, found.kind) == (0.3, "principal")
    for number in range(5):
        expected = latents.in_deviations(pca.directions[number], encodings)
        torch.testing.assert_close(found[number], expected, rtol=1e-3, atol=1e-5)
    shares = pca.deviations.double().square() / pca.deviations.double().square().sum()
    assert found.names == tuple(f"{number} · {share:.0%}" for number, share in enumerate(shares[:5].tolist()))
    assert [len(named_directions(model, "principal", encodings, 0.3, most)) for most in (None, 99)] == [39, 39]


def test_a_channel_moves_its_whole_map_by_the_deviation_of_its_mean(model, refiner):
    encodings = codes(model, 0.3)
    encodings[:, 2] = 0.5  # a dead one
    found = named_directions(model, "channel", encodings, 0.3)
    assert found.names == ("channel 0", "channel 1", "channel 3")
    for name, step in zip(found.names, found.steps, strict=True):
        moved = torch.zeros(4, 8, 8)
        moved[int(name[-1])] = encodings[:, int(name[-1])].mean((1, 2)).std()
        torch.testing.assert_close(step, moved, rtol=1e-4, atol=1e-6)
    vectors = codes(refiner, None)
    found = named_directions(refiner, "channel", vectors)
    torch.testing.assert_close(found.steps.flatten(1), vectors.flatten(1).std(0).diag())  # a dimension moves by its deviation
    assert found.beta is None


def test_attributes_are_those_that_split_the_images(model):
    found = named_directions(model, "attribute", Stripes(), 0.3)
    assert found.names == ("striped",)
    encodings, striped = codes(model, 0.3), torch.arange(40) % 2 == 1
    towards = model.attribute_direction(encodings[striped], encodings[~striped], 0.3)
    torch.testing.assert_close(found["striped"], latents.in_deviations(towards, encodings), rtol=1e-3, atol=1e-5)


def test_of_a_dataset_some_images_are_taken(model, monkeypatch):
    monkeypatch.setattr(directions, "DIRECTION_IMAGES", 12)
    few = data.to_float(Stripes().images(data.choose(40, 12)))
    found, expected = (named_directions(model, "principal", images, 0.3, 3) for images in (Stripes(), few))
    torch.testing.assert_close(found.steps, expected.steps, rtol=1e-3, atol=1e-4)


def test_what_is_refused(model, refiner):
    images = data.to_float(Stripes().images(range(4)))
    for arguments, message in (
        (("semantic", images, 0.3), "kind must be one of principal, channel, attribute, got 'semantic'"),
        (("attribute", images, 0.3), "need a dataset that knows attributes"),
        (("attribute", data.Subset(Stripes(), torch.arange(0, 40, 2)), 0.3), "no attribute splits these 20 images"),
        (("principal", images[:1], 0.3), "those of these 1 do not at beta 0.3"),
        (("principal", images, 1.0), "those of these 4 do not at beta 1$"),
        (("principal", images, 0.3, 0), "most must be .*, got 0"),
        (("principal", images, 1.5), r"beta must lie in \[0, 1\], got 1.5"),
        (("principal", images), "does not know what each beta keeps"),
    ):
        with pytest.raises(ValueError, match=message):
            named_directions(model, *arguments)
    with pytest.raises(ValueError, match="takes no betas"):
        named_directions(refiner, "principal", images, 0.3)


def test_a_file_serves_the_latents_that_it_is_of(model, latent, refiner, baseline, tmp_path):
    path = tmp_path / "directions.safetensors"
    found = named_directions(model, "channel", codes(model, 0.3), 0.3)
    found.save(path)
    read = model.load_directions(path)
    assert torch.equal(read.steps, found.steps) and read.names == found.names
    for other in (refiner, baseline, latent):
        with pytest.raises(ValueError, match="holds directions of another model"):
            other.load_directions(path)


def test_the_digest_of_latents_is_that_of_what_encodes(make_refiner, tmp_path):
    model = make_refiner()
    of_latents, of_all = model.latent_digest(), model.digest()
    with torch.no_grad():
        next(model.vae.decoder.parameters()).add_(1)
        next(model.diffusion.parameters()).add_(1)
    assert model.latent_digest() == of_latents and model.digest() != of_all
    model.save_pretrained(tmp_path / "saved")
    assert type(model).from_pretrained(tmp_path / "saved").latent_digest() == of_latents
    with torch.no_grad():
        next(model.vae.encoder.parameters()).add_(1)
    assert model.latent_digest() != of_latents


def test_a_traversal_moves_one_image_along_each_direction(model, baseline):
    image = data.to_float(Stripes().images([3]))
    for each, beta, few in ((model, 0.3, {"sampler": "resample", "steps": 3}), (baseline, None, {})):
        found = named_directions(each, "channel", Stripes(), beta, 2)
        rows = traversals(each, image, found.steps, (-1.0, 0.0, 2.0), beta, denoise=each.denoises, **few)
        assert rows.shape == (2, 3, 3, 16, 16)
        torch.testing.assert_close(rows[0, 1], rows[1, 1])  # unmoved, from the same noise
        seeds = {"seeds": [0]} if few else {}
        torch.testing.assert_close(rows[1, 2:], each.manipulate(image, found[1], 2.0, beta, **seeds, **few), rtol=0, atol=1e-4)
