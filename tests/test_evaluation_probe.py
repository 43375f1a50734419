"""Which images a probe of codes learns from and is tested on, and that its numbers are those of the metrics."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta import data, metrics, ops, recipes
from multibeta.evaluation import class_probe, evaluate, recorded_split, results_table
from multibeta.evaluation.records import data_origin
from multibeta.pipelines import BaselineVAE
from multibeta.recipes.recipe import to_dict

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}
QUIET = {"fidelity": False, "probe": True, "progress": False}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Noisy images of three colours, 20, 21 and 22 of them, one of a fourth, as classes."""
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    random = np.random.RandomState(0)
    for count, (name, colour) in enumerate([*COLOURS.items(), ("alone", (9, 9, 9))], start=20):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(1 if name == "alone" else count):
            pixels = np.clip(np.array(colour) + 40 * random.randn(16, 16, 3), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index:02}.png")
    return data.ImageFolder(tmp_path / "photos", 16, progress=False)


def recorded(model, dataset, mirror=False, **changes):
    """The model as if it had been trained on a dataset."""
    recipe = recipes.find("scenes32-small")
    recipe = replace(recipe, data=recipes.DataOptions(source="photos", num_test=10, seed=3, mirror=mirror))
    held_out = min(10, len(dataset) // 5)
    images = {"training": len(dataset) - held_out, "held_out": held_out, "fingerprint": data.fingerprint_of(dataset)}
    return BaselineVAE(model.vae, {"recipe": to_dict(recipe), "images": images | changes})


def chosen(model, dataset, num_images=1000, seed=0):
    return class_probe(model, dataset, num_images, seed=seed, batch_size=16, progress=False)


def test_both_halves_have_of_every_class_and_a_single_image_is_left_out(baseline, folder):
    probe = chosen(baseline, folder)
    parts = [folder.labels(part) for part in (probe.learning, probe.test)]
    assert sorted([*probe.learning.tolist(), *probe.test.tolist()]) == list(range(1, 64))  # 0 is in "alone"
    counts = [part.bincount(minlength=4).tolist() for part in parts]
    assert all(abs(one - other) <= 1 for one, other in zip(*counts, strict=True))
    assert (probe.held_out, probe.left_out, probe.origin["classes"]) == (False, ("alone",), 3)
    assert not torch.equal(chosen(baseline, folder, seed=1).learning, probe.learning)
    assert torch.equal(chosen(baseline, folder).learning, probe.learning)
    assert len(chosen(baseline, folder, 30).learning) + len(chosen(baseline, folder, 30).test) in (29, 30)


def test_it_learns_from_what_the_model_was_trained_on_and_is_tested_on_what_it_held_out(baseline, folder):
    model = recorded(baseline, folder)
    training, held_out = data.split(folder, 54, 10, seed=3)
    probe = chosen(model, folder)
    assert probe.held_out
    assert set(probe.learning.tolist()) == set(training.indices.tolist()) - {0}  # which is in "alone"
    assert set(probe.test.tolist()) == set(held_out.indices.tolist())
    assert len(chosen(model, folder, 20).learning) in (19, 20)


def test_mirror_images_are_none_of_the_dataset(baseline, folder, caplog, tmp_path):
    model = recorded(baseline, folder, mirror=True, training=108)
    assert data_origin(model, folder)["trained_on"] == 54 and "trained on 54 of these 64 images" in caplog.text
    assert recorded_split(model, folder) is not None
    model.save_pretrained(tmp_path)
    assert "54 and their mirror images trained on, 10 held out" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_split_that_is_not_recorded_is_not_made_up(baseline, folder, tmp_path):
    model = recorded(baseline, folder)
    assert recorded_split(model, folder) is not None and recorded_split(baseline, folder) is None
    assert recorded_split(model, data.Subset(folder, range(60))) is None  # it has the fingerprint of the whole
    assert recorded_split(recorded(baseline, folder, fingerprint="of others"), folder) is None
    assert recorded_split(recorded(baseline, folder, training=53), folder) is None
    assert recorded_split(recorded(baseline, folder, training=64, held_out=0), folder) is None
    assert recorded_split(model, data.Scenes(16)) is None
    assert not chosen(recorded(baseline, folder, training=53), folder).held_out


def test_numbers_are_those_of_the_metrics_on_the_same_codes(model, folder):
    result = evaluate(model, folder, betas=[0.2, 0.7], batch_size=16, seed=4, **QUIET)
    probe = class_probe(model, folder, 10_000, seed=4, batch_size=16, progress=False)
    parts = probe.learning, probe.test

    def scores(encode):
        chunks = torch.cat(parts).split(16)
        codes = torch.cat([encode(data.to_float(folder.images(chunk)), chunk).flatten(1) for chunk in chunks])
        train_codes, test_codes = codes.split([len(part) for part in parts])
        arrays = train_codes, folder.labels(parts[0]), test_codes, folder.labels(parts[1])
        nearest = {f"nearest_{k}": found for k, found in metrics.nearest_neighbours(*arrays).items()}
        return metrics.linear_probe(*arrays, seed=4) | nearest

    for row in result["rows"]:
        found, beta = dict(row["probe"]), row["beta"]
        sampled = found.pop("sampled")
        assert found == scores(lambda images, _, b=beta: model.encode(images, b))
        assert sampled == scores(lambda images, part, b=beta: model.encode(images, b, seeds=ops.sample_seeds(4, part)))


def test_pixels_that_tell_classes_score_beside_the_codes(baseline, folder):
    result = evaluate(baseline, folder, **QUIET)
    assert json.loads(json.dumps(result, allow_nan=False))["probe"]["left_out"] == ["alone"]
    fewer = result["probe"]["num_train"] - 1
    size = int(np.prod(baseline.vae.config.latent_shape))
    pixels = result["probe"]["pixels"]
    assert [row["components"] for row in pixels] == list(dict.fromkeys([min(size, fewer), min(32, fewer)]))
    assert all(row["nearest_1"] == row["nearest_5"] == 1 for row in pixels)
    images = data.to_float(folder.images(range(64))).flatten(1)
    probe = chosen(baseline, folder, 10_000)
    learning, test = probe.learning, probe.test
    fitted = images[learning]
    axes = torch.linalg.svd(fitted - fitted.mean(0), full_matrices=False).Vh[: len(learning) - 1]
    codes = [(images[part] - fitted.mean(0)) @ axes.T for part in (learning, test)]
    expected = metrics.linear_probe(codes[0], folder.labels(learning), codes[1], folder.labels(test))["accuracy"]
    assert pixels[-1]["accuracy"] == pytest.approx(expected, abs=0.07)
    assert result["skipped"].keys() == {"mig", "tad"}  # classes are no factors


def test_the_table_has_the_probe_the_pixels_and_chance(model, baseline, folder):
    result = evaluate(model, folder, betas=[0.5], **QUIET)
    head, row, *rest = results_table(result).splitlines()
    assert head.split()[-5:] == ["probe", "balanced", "1-NN", "5-NN", "sampled"]
    found = result["rows"][0]["probe"]
    shown = [found[name] for name in ("accuracy", "balanced_accuracy", "nearest_1", "nearest_5")] + [found["sampled"]["accuracy"]]
    assert row.split()[-5:] == [f"{value:.3f}" for value in shown]
    assert rest[0].split()[:2] == ["PCA", str(result["probe"]["num_train"] - 1)] and rest[1].split()[:1] == ["chance"]
    assert f"{result['probe']['chance']:.3f}" in rest[1]
    seen = "of which the model may have seen any; without alone: too few images"
    assert any(line.startswith("probe of 3 classes, learned from 3") and line.endswith(seen) for line in rest)
    held_out = evaluate(recorded(baseline, folder), folder, **QUIET)
    assert "tested on 10, which the model held out" in results_table(held_out)


def test_known_factors_or_attributes_are_told_where_there_are_no_classes(baseline):
    indices = np.random.RandomState(0).permutation(480_000)[:90]
    for scenes, kind, names in (
        (data.Scenes(16), "factors", data.Scenes.factor_names),
        (Hidden(16), "attributes", data.Scenes.attribute_names),
    ):
        probe = chosen(baseline, data.Subset(scenes, indices))
        codes = np.random.RandomState(0).randn(90, 2)
        found = probe.scores(codes)
        assert probe.kind == kind and set(probe.origin["classes"]) == set(found["of"]) <= set(names)
        assert found["accuracy"] == pytest.approx(np.mean([each["accuracy"] for each in found["of"].values()]))
        name = "object_hue" if kind == "factors" else "large"
        labels = getattr(scenes, kind)(indices)[:, names.index(name)].numpy()
        train, test = (labels[part] for part in (probe.learning, probe.test))
        seen = np.isin(test, train)  # a value that was never seen cannot be told
        both = np.isin(train, test)
        expected = metrics.linear_probe(codes[:45][both], train[both], codes[45:][seen], test[seen])
        assert expected.items() <= found["of"][name].items()


class Hidden(data.Scenes):
    """Scenes whose factors are not told."""

    factor_names = ()


def test_without_classes_the_probe_is_refused_before_anything_is_measured(baseline, folder):
    class Unread(data.Subset):
        class_names = ()

        def images(self, indices):
            raise AssertionError("measured")

    unknown = Unread(folder, range(5))
    unknown.class_names = ()
    with pytest.raises(ValueError, match="a probe needs known classes, Unread has none: in a folder, one subfolder for"):
        evaluate(baseline, unknown, num_images=5, **QUIET)
    few = Unread(folder, [0, 1, 40, 41])
    with pytest.raises(ValueError, match="too few images for a probe of classes, 2 to learn from and 2 to be tested on"):
        evaluate(baseline, few, **QUIET)
