"""What models and directions show of themselves in a notebook, and that it costs little and never fails."""

import copy
import gc
import pickle
import re

import pytest
import torch

from multibeta import data, markup
from multibeta.latents import SHOWN_STRENGTHS, principal_directions
from multibeta.pipelines import display, named_directions
from multibeta.pipelines.display import TooSlow, Watch, traversals

SCENES = data.Subset(data.Scenes(16), torch.arange(0, 480_000, 8_000))


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def ample_time(monkeypatch):
    """However slow the machine is, there is time for all."""
    monkeypatch.setattr(display, "SECONDS", 1e6)
    monkeypatch.setattr(display, "DIRECTION_SECONDS", 1e6)


@pytest.fixture
def walks(monkeypatch, model):
    """How often the model rendered or generated."""
    counts = []
    for verb in ("render", "generate"):
        real = getattr(type(model), verb)
        monkeypatch.setattr(type(model), verb, lambda *a, real=real, **k: (counts.append(1), real(*a, **k))[1])
    return counts


@pytest.mark.parametrize("name", ["model", "refiner", "baseline", "latent"])
def test_a_model_shows_what_it_is_and_new_images(name, request):
    each = request.getfixturevalue(name)
    shown = each._repr_html_()
    for fact in (type(each).__name__, "3 x 16 x 16", *each.samplers):
        assert fact in shown
    assert shown.count("<img ") == display.SHOWN_IMAGES and shown.count('alt="new image ') == display.SHOWN_IMAGES
    assert markup.picture(each.generate(1)[0], "new image 0 of seed 0") in shown  # those of `generate`
    assert "script" not in shown and not re.search("#000|#fff|black|white", shown.split("base64")[0])


def test_no_bar_is_shown_for_them(baseline, capsys):
    baseline.set_progress_bar_config(desc="mine")
    try:
        baseline._repr_html_()
        assert capsys.readouterr().err == ""
        baseline.generate(1)
        assert "mine" in capsys.readouterr().err
    finally:
        baseline.set_progress_bar_config(disable=True)


def test_it_is_made_once_for_the_same_weights(model, walks):
    model = copy.deepcopy(model)
    first = model._repr_html_()
    made = len(walks)
    assert made and model._repr_html_() == first and len(walks) == made
    with torch.no_grad():
        model.diffusion.unet.conv_out.weight.add_(1)
    assert model._repr_html_() != first and len(walks) > made


def test_what_takes_too_long_or_fails_leaves_the_facts(model, monkeypatch):
    for error, words in ((TooSlow("no pictures here: one takes about 9 s"), "about 9 s"), (RuntimeError("<no>"), "&lt;no&gt;")):
        other = copy.deepcopy(model)
        monkeypatch.setattr(other, "generate", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        shown = other._repr_html_()
        assert "<img" not in shown and words in shown and "88,854" in shown
    monkeypatch.setattr(display, "SECONDS", 0.0)
    assert "no pictures here: one takes about" in copy.deepcopy(model)._repr_html_()


def test_a_walk_is_judged_by_its_pace_after_the_first_evaluation(monkeypatch):
    monkeypatch.setattr(display, "SECONDS", 1.0)
    times = iter([30.0, 30.5, 31.0, 31.5])  # whatever came before
    monkeypatch.setattr(display.time, "perf_counter", lambda: next(times))
    watch = Watch()
    for done in (1, 2, 3):
        watch(done, 20, torch.zeros(1))
    assert watch.seconds == 10
    with pytest.raises(TooSlow, match="one takes about 10 s"):
        watch(4, 20, torch.zeros(1))


@pytest.mark.parametrize("name", ["model", "refiner", "baseline"])
def test_directions_show_one_image_moved_along_each(name, request):
    each = request.getfixturevalue(name)
    beta = 0.3 if each.usual_levels else None
    images = data.to_float(SCENES.images(range(20)))
    found = each.principal_directions(images, beta, 3)
    shown = found._repr_html_()
    assert shown.count("<img ") == 15 and shown.count('scope="row"') == 3
    assert shown.startswith("<p>PrincipalDirections(3 of shape") and "−1.5" in shown
    moves = found.directions * found.deviations.view(-1, 1, 1, 1)
    rows = traversals(each, images[:1], moves, SHOWN_STRENGTHS, beta, denoise=each.denoises)
    assert markup.picture(rows[1, 4], "1, moved by +3") in shown and "decoded at once" not in shown
    named = named_directions(each, "principal", images, beta, 3)
    assert "0 · " in named._repr_html_() and named._repr_html_().count("<img ") == 15


def test_latents_of_a_level_that_is_not_told_are_not_rendered(model):
    assert model.principal_directions(model.encode(data.to_float(SCENES.images(range(9))), 0.3)).shown_by is None
    assert model.principal_directions(model.encode(data.to_float(SCENES.images(range(9))), 0.3), 0.3).shown_by is not None


def test_directions_are_moved_once(model, walks):
    found = named_directions(model, "channel", SCENES, 0.3)
    first, made = found._repr_html_(), len(walks)
    assert found._repr_html_() == first and len(walks) == made


def test_where_there_is_no_time_to_denoise_images_are_decoded_at_once(model, monkeypatch):
    found = named_directions(model, "principal", SCENES, 0.3, 12)
    monkeypatch.setattr(display, "affordable", lambda model, latent, beta, denoise: 2 if denoise else 99)
    shown = found._repr_html_()
    assert "decoded at once: to denoise them would take longer; 4 more are not shown" in shown and shown.count("<img ") == 40
    found = named_directions(model, "principal", SCENES, 0.3, 2)
    assert "decoded at once" not in found._repr_html_()  # there are no more than two
    monkeypatch.setattr(display, "affordable", lambda model, latent, beta, denoise: 0)
    assert "<img" not in named_directions(model, "channel", SCENES, 0.3)._repr_html_()


def test_without_their_model_directions_are_a_table_of_deviations(make_refiner):
    alone = principal_directions(rand(20, 6, 1, 1))
    shown = alone._repr_html_()
    assert "<img" not in shown and f"{float(alone.deviations[1]):.3g}" in shown and "standard deviation" in shown
    model = make_refiner()
    found = model.principal_directions(rand(20, 6, 1, 1))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.shown_by is None and torch.equal(other.directions, found.directions)
    assert found.shown_by is not None and "shown_by" not in repr(found)
    del model
    gc.collect()
    assert "<img" not in found._repr_html_()  # which they do not keep alive


def test_directions_of_a_file_move_a_new_image(baseline, tmp_path):
    named_directions(baseline, "channel", SCENES).save(tmp_path / "directions.safetensors")
    shown = baseline.load_directions(tmp_path / "directions.safetensors")._repr_html_()
    assert shown.count("<img ") == 20 and "channel 3, moved by −3" in shown
