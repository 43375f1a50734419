"""New images on the disk: whole files, continued where a call was stopped, never of two models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta import files
from multibeta.pipelines import generate_folder, generate_npz


@pytest.fixture(params=("model", "refiner", "baseline"))
def each(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def few(each):
    """Options of a short reverse process."""
    return each.sampling_options(steps=3) if each.denoises else {}


def contents(folder):
    """Name to bytes of the pictures of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_a_folder_holds_the_images_of_generate(each, few, tmp_path):
    generate_folder(each, tmp_path, 5, seed=3, batch_size=2, **few)
    assert list(contents(tmp_path)) == [f"{index:06}.png" for index in range(5)]
    pictures = each.generate(5, seed=3, batch_size=2, output_type="pil", **few)
    made = [np.asarray(picture) for picture in pictures]
    assert np.array_equal(made, [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))])
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {"class": type(each).__name__, "digest": each.digest(), "seed": 3, "num_images": 5, **few}


def test_a_call_that_was_stopped_goes_on_to_the_same_files(model, tmp_path, monkeypatch):
    options = {"batch_size": 2, "sampler": "ancestral", "steps": 3}
    generate_folder(model, tmp_path / "whole", 7, **options)
    written = []

    def write_all(writers):
        if len(written) == 3:  # the index and two batches
            raise KeyboardInterrupt
        written.append(list(writers))
        write(writers)

    write = files.write_all
    with monkeypatch.context() as meanwhile, pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        meanwhile.setattr(files, "write_all", write_all)
        generate_folder(model, tmp_path / "stopped", 7, **options)
    assert len(contents(tmp_path / "stopped")) == 4
    (tmp_path / "stopped" / "000001.png").unlink()
    kept = (tmp_path / "stopped" / "000000.png").stat().st_mtime_ns
    generate_folder(model, tmp_path / "stopped", 7, **options)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert (tmp_path / "stopped" / "000000.png").stat().st_mtime_ns == kept


def test_more_images_are_added_and_others_refused(model, baseline, tmp_path):
    options = {"batch_size": 2, "steps": 3}
    generate_folder(model, tmp_path, 3, **options)
    generate_folder(model, tmp_path, 5, **options)
    assert len(contents(tmp_path)) == 5
    for other, changes, told in (
        (model, {"seed": 1}, "seed is 0 there and 1 here"),
        (model, {"steps": 4}, "steps is 3 there and 4 here"),
        (model, {"sampler": "ancestral"}, "sampler is ode2 there and ancestral here"),
        (baseline, {"steps": None}, "class is DenoisingMultiBetaVAE there and BaselineVAE here, another model"),
    ):
        with pytest.raises(ValueError, match=told):
            generate_folder(other, tmp_path, 5, **options | changes)
    with pytest.raises(ValueError, match="num_images is 5 there and 4 here"):
        generate_folder(model, tmp_path, 4, **options)


def test_the_digest_is_of_weights_and_configs(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.digest() == model.digest()
    with torch.no_grad():
        next(again.diffusion.parameters())[0] += 0.5
    assert again.digest() != model.digest()


def test_an_npz_file_holds_what_evaluators_read(model, tmp_path):
    generate_npz(model, tmp_path / "samples.npz", 5, batch_size=2, steps=3)
    generate_folder(model, tmp_path, 5, batch_size=2, steps=3)
    pictures = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))]
    (made,) = files.read_arrays(tmp_path / "samples.npz").values()
    assert made.dtype == np.uint8 and np.array_equal(made, pictures)


@pytest.mark.parametrize("wrong", ({"num_images": 0}, {"batch_size": 0}, {"num_images": 2.5}))
def test_counts_are_checked_before_anything_is_made(model, tmp_path, wrong):
    for generate in (generate_folder, generate_npz):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generate(model, tmp_path / "out", **({"num_images": 2} | wrong))
    assert not list(tmp_path.iterdir())
