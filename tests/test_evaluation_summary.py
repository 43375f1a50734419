"""Measures of saved models: the numbers are those of the metrics, on images that are asked for in batches."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from multibeta import data, evaluation, metrics, ops
from multibeta.baselines import VAE
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.evaluation import evaluate, results_table
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, process_statistics
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE, Pipeline

STEPS = 20
SHAPE = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_groups": 4}
CONFIG = VAEConfig(resolution=16, mid_attention=False, embedding_channels=16, num_steps=STEPS, **SHAPE)
UNET = DiffusionConfig(latent_resolution=8, attention_resolutions=(), head_channels=8, num_steps=STEPS, **SHAPE)
QUIET = {"progress": False, "steps": 2}
BATCH = 64


@pytest.fixture(scope="module")
def model():
    """Random weights, but a process that fits its encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, diffusion = MultiBetaVAE(CONFIG), NonlinearDiffusion(UNET)
    images = data.to_float(data.Scenes(16).images(range(0, 320000, 20000)))
    diffusion.set_process(vae.sigmas(), *process_statistics(vae.encode, images, STEPS, nodes=10))
    return DenoisingMultiBetaVAE(vae, diffusion, {"recipe": {"name": "tiny"}, "command": "multibeta train"})


@pytest.fixture(scope="module")
def baseline():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaselineVAE(VAE(CONFIG))


class Streamed:
    """A dataset that refuses to show more than a batch of images at once; `hidden` names what it does not know."""

    channels, resolution = 3, 16

    def __init__(self, *hidden, length=None):
        self.scenes, self.length = data.Scenes(16), length
        known = {"factors": ("factor_names", "factor_sizes"), "attributes": ("attribute_names",)}
        for name, descriptions in known.items():
            if name not in hidden:
                for each in (name, *descriptions):
                    setattr(self, each, getattr(self.scenes, each))

    def __len__(self):
        return self.length or len(self.scenes)

    def images(self, indices):
        assert len(indices) <= BATCH
        return self.scenes.images(torch.as_tensor(indices) * (len(self.scenes) // len(self)))


def strict(result):
    """The result as a strict JSON file would give it back."""
    return json.loads(json.dumps(result, allow_nan=False))


def means(images):
    """Features of images (n, 3, 16, 16): 48 averages, which depend on little but the image itself."""
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1)


def test_a_perfect_encoder_scores_near_the_ceiling():
    scenes = Streamed("attributes")  # TAD would draw other images than those that are known

    class Oracle(Pipeline):
        """Reads the factors off the images, which it knows by heart."""

        def __init__(self):
            indices = torch.from_numpy(np.random.RandomState(0).randint(len(scenes), size=400))
            shown = torch.cat([scenes.images(chunk) for chunk in indices.split(BATCH)])
            self.known = {image.numpy().tobytes(): row for image, row in zip(shown, scenes.factors(indices), strict=True)}
            self.vae, self.info = MultiBetaVAE(CONFIG), {}

        def encode(self, images, beta=None, *, seeds=None):
            return torch.stack([self.known[image.numpy().tobytes()] for image in data.to_uint8(images)]).float()

    found = evaluate(Oracle(), scenes, num_images=400, fidelity=False, **QUIET)["rows"][0]["mig"]
    assert found["mig"] > 0.9 * found["ceiling"]
    assert set(found["gaps"]) == set(found["max_information"]) == set(data.Scenes.factor_names)
    assert found["max_information"]["shape"] == pytest.approx(found["entropy"]["shape"])


def test_numbers_are_those_of_the_metrics_on_the_same_images(model):
    scenes = Streamed()
    result = strict(evaluate(model, scenes, betas=[0.3, 0.8], num_images=150, features=means, auroc="exact", seed=5, **QUIET))
    assert [row["beta"] for row in result["rows"]] == [0.3, 0.8]

    def encode(images):
        return model.encode(images, 0.8)

    row = result["rows"][1]
    gap = metrics.mig(encode, scenes, num_images=150, seed=5, progress=False)
    assert row["mig"]["mig"] == gap["mig"]
    assert list(row["mig"]["gaps"].values()) == gap["gaps"].tolist()
    assert list(row["mig"]["max_information"].values()) == gap["mutual_information"].max(1).tolist()
    difference = metrics.tad(encode, scenes, num_images=150, auroc="exact", seed=5, progress=False)
    assert row["tad"]["tad"] == difference["tad"] and row["tad"]["captured"] == difference["captured"]
    assert list(row["tad"]["best_area"].values()) == difference["areas"].max(1).tolist()

    indices = np.random.RandomState(5).permutation(len(scenes))[:150]
    images = data.to_float(scenes.scenes.images(indices))
    latents = model.encode(images, 0.8, seeds=ops.sample_seeds(5, torch.from_numpy(indices)))
    made = {
        "direct": model.decode(latents, 0.8),
        "denoised": model.decode(model.denoise(latents, 0.8, "ode2", 2)),
        "generation": model.generate(150, "ode2", 2, seed=5),
    }
    for name, expected in made.items():
        found = result["generation"] if name == "generation" else row[name]
        assert found["frechet"] == pytest.approx(metrics.frechet_distance(means(images), means(expected)), rel=1e-3)
        assert (found["precision"], found["recall"]) == pytest.approx(metrics.precision_recall(means(images), means(expected)))
        sharpness = metrics.gradient_energy(expected).mean() / metrics.gradient_energy(images).mean()
        assert found["sharpness"] == pytest.approx(float(sharpness), rel=1e-3)
        assert (found["num_images"], found["num_real"], found["seed"]) == (150, 150, 5)
        assert found.get("sampler") == (None if name == "direct" else "ode2")


def test_dci_is_measured_where_asked_and_kept(model, tmp_path):
    options = {"betas": [0.3], "num_images": 40, "fidelity": False, "dci": True, "cache": tmp_path, **QUIET}
    found = evaluate(model, Few(), **options)["rows"][0]["dci"]
    expected = metrics.dci(
        lambda images: model.encode(images, 0.3), Few(), num_train=40, num_test=20, cache=tmp_path, progress=False
    )
    assert len(list(tmp_path.iterdir())) == 2  # a file for each factor: the second call only read them
    for name in ("disentanglement", "completeness", "informativeness_test"):
        assert found[name] == expected[name]
    assert list(found["accuracy_test"]) == ["floor_hue", "shape"]


class Few(Streamed):
    """Two factors only, for trees that grow in a second."""

    factor_names = ("floor_hue", "shape")

    def __init__(self):
        super().__init__("factors")
        self.factors = lambda indices: self.scenes.factors(indices)[:, [0, 4]]


def test_without_factors_the_measures_that_need_them_are_left_out_with_a_word(model):
    result = strict(evaluate(model, Streamed("factors", "attributes"), betas=[0.5], num_images=70, **QUIET))
    assert result["skipped"] == {"mig": "the images have no known factors", "tad": "the images have no known attributes"}
    assert result["rows"][0].keys() == {"beta", "direct", "denoised"}
    assert result["features"]["features"] == "64 principal components of the pixels"
    assert result["data"]["factor_names"] is None
    assert "no mig: the images have no known factors" in results_table(result)


def test_with_factors_a_classifier_is_trained_on_other_images(model, monkeypatch):
    seen = {}

    def classifier_features(train_set, test_set, *, progress):
        seen.update(train=set(train_set.indices.tolist()), test=set(test_set.indices.tolist()))
        return evaluation.Features("a classifier", means, accuracy={"shape": 1.0})

    monkeypatch.setattr(evaluation.features, "classifier_features", classifier_features)
    monkeypatch.setattr("multibeta.data.images.CHUNK", BATCH)
    monkeypatch.setattr("multibeta.evaluation.features.CLASSIFIER_IMAGES", 300)
    result = evaluate(model, Streamed(), betas=[0.5], num_images=80, **QUIET)
    assert len(seen["train"]) == 300 and len(seen["test"]) == 80 and not seen["train"] & seen["test"]
    assert result["features"] | {"accuracy": {"shape": 1.0}, "features": "a classifier"} == result["features"]


def test_a_latent_of_a_single_number_has_no_gap():
    shape = {"architecture": "toy", "resolution": 16, "latent_channels": 1, "base_channels": 8, "channel_multipliers": (1, 1)}
    vae = VAE(VAEConfig(num_groups=4, embedding_channels=16, **shape))
    result = strict(evaluate(BaselineVAE(vae), data.Scenes(16), num_images=80, features=means, progress=False))
    assert result["skipped"] == dict.fromkeys(("mig", "tad"), "it compares codes, and the latent is a single number")
    assert result["generation"] and "mig" not in result["rows"][0]


def test_a_baseline_has_one_row(baseline):
    result = strict(evaluate(baseline, Streamed(), num_images=80, features=means, progress=False))
    (row,) = result["rows"]
    assert row["beta"] is None and row.keys() == {"beta", "mig", "tad", "direct"}
    assert result["generation"].keys() & {"sampler", "steps"} == set()
    images = baseline.generate(80)
    real = data.Scenes(16).images(np.random.RandomState(0).permutation(480_000)[:80])
    expected = metrics.frechet_distance(means(data.to_float(real)), means(images))
    assert result["generation"]["frechet"] == pytest.approx(expected, rel=1e-3)
    assert result["model"]["class"] == "BaselineVAE" and set(result["model"]["weights_hash"]) == {"vae"}


@pytest.fixture(scope="module")
def refiner():
    blocks = BlockAutoencoderConfig(
        resolution=16, encoder_blocks="16d2,16t8,8d8,8t1,1x1", decoder_blocks="1u8,1t8,8u2,8t16,16x1", channels="16:8,8:8,1:6"
    )
    unet = {"base_channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": (), "num_groups": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiffusionVAE(
            CapacityVAE(blocks),
            ConditionalDiffusion(ConditionalDiffusionConfig(resolution=16, num_heads=2, num_steps=50, **unet)),
        )


@pytest.mark.parametrize(("given", "used"), [({}, ("ddim", 50)), ({"sampler": "ddpm", "steps": 3}, ("ddpm", 3))])
def test_a_refiner_is_measured_as_it_sketches_and_as_it_refines(refiner, given, used):
    result = strict(evaluate(refiner, Streamed(), num_images=20, seed=5, features=means, progress=False, **given))
    (row,) = result["rows"]
    assert row["beta"] is None and row.keys() == {"beta", "mig", "tad", "direct", "denoised"}
    assert (row["denoised"]["sampler"], row["denoised"]["steps"]) == used and "sampler" not in row["direct"]
    assert (result["generation"]["sampler"], result["generation"]["steps"]) == used
    assert f"20 generated by {used[0]}, {used[1]} steps" in results_table(result)

    indices = torch.from_numpy(np.random.RandomState(5).permutation(480_000)[:20])
    real, seeds = data.to_float(data.Scenes(16).images(indices)), ops.sample_seeds(5, indices)
    sketches = refiner.decode(refiner.encode(real, seeds=seeds))
    made = {"direct": sketches, "denoised": refiner.denoise(sketches, *used, seeds=seeds)}
    for name, images in made.items():
        assert row[name]["frechet"] == pytest.approx(metrics.frechet_distance(means(real), means(images)), rel=1e-3)
    assert row["direct"]["frechet"] != row["denoised"]["frechet"]
    generated = refiner.generate(20, *used, seed=5)
    assert result["generation"]["frechet"] == pytest.approx(metrics.frechet_distance(means(real), means(generated)), rel=1e-3)


@pytest.mark.parametrize("fidelity", [True, False])
@pytest.mark.parametrize(
    ("which", "walk", "message"),
    [
        ("refiner", {"steps": -5}, "steps must lie between 1 and 50, the steps of the grid, got -5"),
        ("refiner", {"steps": 51}, "steps must lie between 1 and 50, .* got 51"),
        ("refiner", {"sampler": "ode2"}, "sampler of a DiffusionVAE must be one of ddpm, ddim, got 'ode2'"),
        ("model", {"sampler": "ddim"}, "sampler of a DenoisingMultiBetaVAE must be one of resample, .*, got 'ddim'"),
        ("model", {"steps": 0}, "steps must lie between 1 and 20, .* got 0"),
        ("model", {"steps": 2.0}, "steps must be an integer, got 2.0"),
        ("model", {"sampler": "dpm"}, "got 'dpm'"),
    ],
)
def test_sampling_that_a_model_cannot_take_is_refused_first(request, which, walk, message, fidelity):
    with pytest.raises(ValueError, match=message):
        evaluate(request.getfixturevalue(which), Unread(), num_images=20, fidelity=fidelity, progress=False, **walk)


@pytest.mark.parametrize(
    ("walk", "named"),
    [({"steps": 2}, "steps"), ({"sampler": "ode", "steps": 2}, "sampler or steps"), ({"sampler": ""}, "sampler")],
)
def test_a_baseline_takes_no_sampling(baseline, walk, named):
    with pytest.raises(ValueError, match=f"a BaselineVAE decodes at once and takes no {named}$"):
        evaluate(baseline, Unread(), num_images=20, **walk)


class Unread(data.Scenes):
    """Scenes that must not be looked at."""

    def __init__(self):
        super().__init__(16)

    def images(self, indices):
        raise AssertionError("measured")


ORIGIN = {"features": "FID Inception, stubbed", "preprocessing": "means", "weights_hash": "abc"}


class Inception(torch.nn.Module):
    """In place of `metrics.load_features`: its origin and width are all that matters here."""

    dimension = 48
    origin = ORIGIN

    def forward(self, images):
        return means(images)


def test_in_inception_features_the_distance_is_fid(baseline):
    result = strict(evaluate(baseline, Streamed(), num_images=80, features=Inception(), progress=False))
    for found in (result["generation"], result["rows"][0]["direct"]):
        assert "fid" in found and "frechet" not in found
        assert found | ORIGIN == found
    assert "direct FID" in results_table(result)


def test_stored_statistics_take_the_place_of_the_images(baseline, tmp_path):
    scenes, path = Streamed(), tmp_path / "reference.npz"
    plain = evaluate(baseline, scenes, num_images=80, features=Inception(), progress=False)["generation"]
    real = data.Scenes(16).images(np.random.RandomState(0).permutation(480_000)[:80])
    mean, covariance = metrics.feature_statistics(means(data.to_float(real)))
    np.savez(path, mu=mean, sigma=covariance)
    result = strict(evaluate(baseline, scenes, num_images=80, features=Inception(), reference=path, progress=False))
    stored = result["generation"]
    assert stored["fid"] == pytest.approx(plain["fid"], rel=1e-6) and stored["sharpness"] == plain["sharpness"]
    assert stored["reference"] == str(path) and len(stored["reference_hash"]) == 16
    assert "precision" not in stored and "precision" not in results_table(result)

    np.savez(path, mu=mean[:4], sigma=covariance[:4, :4])
    with pytest.raises(ValueError, match="statistics of 4 features, the network gives 48"):
        evaluate(baseline, scenes, num_images=80, features=Inception(), reference=path, progress=False)


def test_what_is_not_a_number_is_null(model):
    scenes = Streamed("factors")
    scenes.attribute_names = ("warm_floor", "never")
    scenes.attributes = lambda indices: scenes.scenes.attributes(indices)[:, :2] & torch.tensor([True, False])
    with pytest.warns(UserWarning, match="constant attributes are left out"):
        result = strict(evaluate(model, scenes, betas=[0.5], num_images=60, fidelity=False, **QUIET))
    assert result["rows"][0]["tad"]["difference"]["never"] is None
    assert result["skipped"].keys() == {"mig"} and "generation" not in result
    assert results_table(result).splitlines()[1].split()[0] == "0.5"


def test_the_table_shows_the_numbers(model):
    result = evaluate(model, Streamed(), betas=[0.5], num_images=60, features=means, **QUIET)
    head, row, made, *_ = results_table(result).splitlines()
    titles = "beta  MIG  TAD  direct FD  direct sharpness  denoised FD  denoised sharpness"  # DCI was not measured
    assert re.split(r"\s{2,}", head) == titles.split("  ")
    numbers = [("mig", "mig"), ("tad", "tad")]
    numbers += [(made, measure) for made in ("direct", "denoised") for measure in ("frechet", "sharpness")]
    assert row.split() == ["0.5", *(f"{result['rows'][0][name][key]:.3f}" for name, key in numbers)]
    distance, sharpness = (f"{result['generation'][name]:.3f}" for name in ("frechet", "sharpness"))
    assert made.startswith(f"60 generated by ode2, 2 steps: FD {distance}, sharpness {sharpness}, precision ")


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_sharpness_falls_with_the_square_of_the_gradients(blur):
    scenes, indices = Streamed(), torch.arange(60)
    compare = evaluation.ImageComparison.with_images(means, scenes, indices, None, 16, False)
    images = data.to_float(scenes.images(indices))
    nearer = torch.lerp(images, images.mean((2, 3), keepdim=True), blur)
    assert compare(nearer.split(16), "nearer")["sharpness"] == pytest.approx((1 - blur) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": [0.5, 1.2]}, r"beta must lie in \[0, 1\], got 1.2"),
        ({"betas": []}, "at least one beta"),
        ({"num_images": 3}, "at least 4 images are needed, got num_images=3"),
        ({"steps": STEPS + 1}, "steps must lie between 1 and 20, .*got 21"),
        ({"num_images": 2.5}, "num_images must be an integer, got 2.5"),
        ({"seed": 1.5}, r"a seed must be an integer .*, got 1.5"),
        ({"seed": None}, r"a seed must be an integer .*, got None"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"auroc": "curve"}, '"grid" or "exact", got \'curve\''),
        ({"dci": True}, "DCI needs known factors, Streamed has none"),
        ({"fidelity": False}, "no known factors or attributes"),
        ({"reference": "stats.npz"}, "need the feature network"),
        ({"reference": "stats.npz", "features": means}, "is not a file"),
    ],
)
def test_what_cannot_be_measured_is_said_first(model, options, message):
    def encode(*_, **__):
        raise AssertionError("measured")

    dataset = Streamed("factors", "attributes")
    dataset.images = encode
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(model, dataset, **{**QUIET, **options})


def test_a_baseline_takes_no_betas(baseline):
    with pytest.raises(ValueError, match=r"one representation and takes no betas, got \[0\.5\]"):
        evaluate(baseline, Streamed(), betas=[0.5])


def test_images_of_another_kind(baseline):
    with pytest.raises(ValueError, match="3 channels and 16 pixels, the dataset has 3 and 32"):
        evaluate(baseline, data.Scenes(32))
    with pytest.raises(ValueError, match="1 channels and 16 pixels"):
        evaluate(BaselineVAE(VAE(replace(CONFIG, image_channels=1))), data.Scenes(16))


def test_a_small_dataset_is_measured_whole_or_leaves_enough_to_train_a_classifier(baseline):
    small = Streamed("factors", "attributes", length=70)
    assert evaluate(baseline, small, progress=False)["generation"]["num_real"] == 70
    with pytest.raises(ValueError, match="60 of 70 images leave 10 to train a factor classifier, 128 are needed"):
        evaluate(baseline, Streamed(length=70), num_images=60, progress=False)


def test_beside_images_of_one_colour_each_nothing_has_a_sharpness(model):
    class Flat(Streamed):
        def images(self, indices):
            return super().images(indices)[:, :, :1, :1].expand(-1, -1, 16, 16)

    result = strict(evaluate(model, Flat("factors", "attributes"), betas=[0.5], num_images=8, features=means, **QUIET))
    made = (result["rows"][0]["direct"], result["rows"][0]["denoised"], result["generation"])
    assert [each["sharpness"] for each in made] == [None] * 3
    table = results_table(result)
    assert "sharpness -, precision" in table and "direct sharpness" not in table
