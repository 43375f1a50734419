"""The pictures of the studio: the lines of Python beside each make the very same one, and what is out of bounds is refused."""

import base64
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from multibeta import data
from multibeta.pipelines import named_directions
from multibeta.studio import shown
from multibeta.studio.desk import Desk
from multibeta.studio.origins import MOST_BYTES, OfData, OfFile, OfNoise, Sampling, from_page, to_page
from multibeta.studio.pictures import Edit, Meaning, Move, New, NoisePath, Path, Place, quickly

USUAL = Sampling("ode2", 3, seed=5)
REFINING = Sampling("ddpm", 3, seed=5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twelve images of noise."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02}.png")
    return folder


def desk_of(model, photos, folder):
    """A desk on a saved model, and directions in a file."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    dataset = data.open_dataset(str(photos), 16)
    found = named_directions(loaded, "principal", dataset, 0.4 if loaded.usual_levels else None, 3)
    dataclasses.replace(found, names=("left", "right", "up"), kind="disco").save(folder / "disco.safetensors")
    files = {str(folder / "disco.safetensors"): loaded.load_directions(folder / "disco.safetensors")}
    return Desk(str(folder), loaded, dataset, str(photos), files, num_images=10)


@pytest.fixture(scope="module")
def desk(model, photos, tmp_path_factory):
    return desk_of(model, photos, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def refining(refiner, photos, tmp_path_factory):
    return desk_of(refiner, photos, tmp_path_factory.mktemp("refiner"))


@pytest.fixture(scope="module")
def dropped(photos, desk):
    return OfFile.read(photos / "03.png", "03.png", desk.model)


def multi_beta_pictures(desk):
    place, exact = Place(0.4), Place(0.6, USUAL)
    by_file = next(iter(desk.files))
    moves = Move("principal", desk.name_of("principal", 0.4, 1), 1.5, 0.4), Move("channel", "channel 2", -0.75, 0.5)
    return {
        "edit": Edit(OfData(2), place, moves, USUAL),
        "unmoved": Edit(OfNoise(1, 3, USUAL), place, (), Sampling("ancestral", 4, seed=9)),
        "exact": Edit(OfData(4), exact, (Move(by_file, "right", -2.0, 0.4),), USUAL),
        "meaning": Meaning(OfData(0), place, Move("channel", "channel 0", 1.0, 0.4), USUAL),
        "path": Path(OfData(0), OfData(5), place, 0.3, USUAL, dims=(0, 3)),
        "whole path": Path(OfData(0), OfData(5), exact, None, USUAL, count=4, how="lerp"),
        "new": New(5, USUAL),
    }


def refiner_pictures(desk):
    return {
        "edit": Edit(OfData(2), Place(), (Move("principal", desk.name_of("principal", None, 0), 2.0),), REFINING),
        "meaning": Meaning(OfNoise(0, 2, REFINING, True), Place(), Move("channel", "channel 1", 1.0), REFINING),
        "path": Path(OfData(0), OfData(5), Place(), 0.3, REFINING, how="lerp", shared_noise=True),
        "whole path": Path(OfData(0), OfData(5), Place(), None, REFINING, count=3, how="slerp"),
        "noise": NoisePath(OfData(1), (5, 8), 0.25, REFINING),
        "whole noise": NoisePath(OfData(1), (5, 8), None, REFINING, count=3, shared_noise=True),
        "new": New(3, REFINING, shared_noise=True),
    }


def run(lines, folder, monkeypatch):
    """What lines of Python write into `folder`."""
    monkeypatch.chdir(folder)
    exec(compile(lines, "lines", "exec"), {})
    (written,) = folder.glob("*.png")
    return written


@pytest.mark.parametrize("name", ["edit", "unmoved", "exact", "meaning", "path", "whole path", "new"])
def test_the_lines_beside_a_picture_make_that_picture(desk, name, tmp_path, monkeypatch):
    check_lines(desk, multi_beta_pictures(desk)[name], tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["edit", "meaning", "path", "whole path", "noise", "whole noise", "new"])
def test_they_do_for_a_refiner(refining, name, tmp_path, monkeypatch):
    check_lines(refining, refiner_pictures(refining)[name], tmp_path, monkeypatch)


def check_lines(desk, picture, folder, monkeypatch):
    drawn, lines = picture.draw(desk), picture.lines(desk)
    assert len(drawn.images) == len(drawn.labels) and (not drawn.captions or len(drawn.captions) == len(drawn.images))
    written = run(lines, folder, monkeypatch)
    (folder / "downloaded.png").write_bytes(shown.png_file(drawn, lines))
    with Image.open(written) as repeated, Image.open(folder / "downloaded.png") as downloaded:
        assert repeated.tobytes() == downloaded.tobytes() and repeated.size == downloaded.size
        assert downloaded.text["Description"] == lines


def test_lines_take_smaller_images_where_the_studio_does(desk, tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    for name in "ab":
        Image.new("RGB", (7, 9), {"a": "red", "b": "blue"}[name]).save(tmp_path / "small" / f"{name}.png")
    small = data.open_dataset(str(tmp_path / "small"), 16, upscale=True)
    other = Desk(desk.reference, desk.model, small, str(tmp_path / "small"), upscale=True)
    check_lines(other, Edit(OfData(1), Place(0.4), (), USUAL), tmp_path, monkeypatch)


def test_lines_name_a_dropped_file(desk, dropped, photos, tmp_path, monkeypatch):
    picture = Edit(dropped, Place(0.4), (), USUAL)
    (tmp_path / "03.png").write_bytes((photos / "03.png").read_bytes())
    (tmp_path / "out").mkdir()
    lines = picture.lines(desk).replace("'03.png'", repr(str(tmp_path / "03.png")))
    written = run(lines, tmp_path / "out", monkeypatch)
    with Image.open(written) as repeated:
        assert repeated.tobytes() == shown.grid_picture(picture.draw(desk).images, 3).tobytes()


def test_a_first_look_takes_few_evaluations_and_the_same_way(desk):
    picture = multi_beta_pictures(desk)["exact"]
    quick = quickly(dataclasses.replace(picture, sampling=Sampling("ode2", 40), place=Place(0.6, Sampling("ode2", 20))), desk)
    assert quick.sampling == Sampling("ode2", 4) and quick.place.inverted == Sampling("ode2", 20)
    evaluations = []
    quick.draw(desk, lambda done, total, latent: evaluations.append(total))
    assert evaluations == [20] * 20 + [4] * 4  # up in all steps, since few do not reach the latent
    quick.draw(desk, lambda done, total, latent: evaluations.append(total))
    assert evaluations[24:] == [4] * 4  # once


def test_before_it_is_denoised_a_picture_shows_what_is_decoded(desk, refining):
    for each, pictures in ((desk, multi_beta_pictures), (refining, refiner_pictures)):
        for name in ("edit", "meaning", "path", "whole path"):
            seen = []
            drawn = pictures(each)[name].draw(each, early=seen.append)
            (early,) = seen
            same = (early.images == drawn.images).flatten(1).all(1)
            assert (early.labels, early.columns) == (drawn.labels, drawn.columns)
            assert (~same).sum() == (1 if name in ("edit", "path") else len(same) // 2)
            assert not early.images[~same].any(), "what is not made yet is grey"


def test_a_walk_can_be_ended_between_its_evaluations(desk, refining):
    class Enough(Exception):
        pass

    def stop(done, total, latent):
        if done == 2:
            raise Enough

    for each, pictures in ((desk, multi_beta_pictures), (refining, refiner_pictures)):
        for picture in pictures(each).values():
            with pytest.raises(Enough):
                picture.draw(each, stop)


def test_what_comes_before_a_walk_can_be_ended_too_and_is_done_once(desk):
    new, up = OfNoise(1, 3, Sampling("ode2", 7, seed=8)), Place(0.6, Sampling("ode2", 9))
    totals = []

    def ended_in(total):
        def stop(done, total_now, latent):
            totals.append(total_now)
            if total_now == total:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            Edit(new, up, (), USUAL).draw(desk, stop)

    ended_in(7)
    ended_in(9)
    ended_in(3)
    assert totals == [7] + [7] * 7 + [9] + [9] * 9 + [3], "kept once it is made, and nothing of what was not"


def test_what_is_out_of_bounds_is_refused(desk, refining):
    edit, path, new = (multi_beta_pictures(desk)[name] for name in ("edit", "path", "new"))
    refused = {
        "steps": dataclasses.replace(edit, sampling=Sampling("ode2", 10**9)),
        "at least 1": dataclasses.replace(edit, sampling=Sampling("ode2", 0)),
        "seed must": dataclasses.replace(edit, sampling=Sampling("ode2", 3, seed=-1)),
        "at most 2147483647": dataclasses.replace(edit, sampling=Sampling("ode2", 3, seed=2**40)),
        "sampler": dataclasses.replace(edit, sampling=Sampling("euler", 3)),
        "beta must lie": dataclasses.replace(edit, place=Place(1.5)),
        "beta must": dataclasses.replace(edit, place=Place(math.nan)),
        "the strength of": dataclasses.replace(edit, moves=(Move("channel", "channel 0", 1e9, 0.4),)),
        "finite": dataclasses.replace(edit, moves=(Move("channel", "channel 0", math.inf, 0.4),)),
        "kinds principal, channel": dataclasses.replace(edit, moves=(Move("../secret", "channel 0", 1.0, 0.4),)),
        "no direction 'x'": dataclasses.replace(edit, moves=(Move("channel", "x", 1.0, 0.4),)),
        "images 0 to 11": dataclasses.replace(edit, origin=OfData(12)),
        "at most 64, there is none of number": dataclasses.replace(edit, origin=OfNoise(0, 10**6, USUAL)),
        "of 3 new images": dataclasses.replace(edit, origin=OfNoise(3, 3, USUAL)),
        "dims": dataclasses.replace(path, dims=(99,)),
        "weight": dataclasses.replace(path, weight=math.nan),
        "at most 16": dataclasses.replace(path, weight=None, count=10**6),
        "how must be": dataclasses.replace(path, how="round"),
        "at most 64": dataclasses.replace(new, count=10**6),
        "to invert, sampler must be": dataclasses.replace(edit, place=Place(0.4, Sampling("ancestral", 4))),
    }
    for said, picture in refused.items():
        with pytest.raises((ValueError, KeyError), match=said):
            picture.draw(desk)
    with pytest.raises(ValueError, match="takes no betas"):
        dataclasses.replace(edit, sampling=REFINING).draw(refining)


def test_a_page_keeps_where_its_image_comes_from(dropped):
    for origin in (OfData(3), dropped, OfNoise(1, 3, USUAL, True)):
        assert from_page(to_page(origin)) == origin
    good = json.loads(to_page(OfNoise(1, 3, USUAL)))
    bad = ["", "[]", "{}", "null", "3", '{"data": {"index": "1"}}', '{"data": {"index": true}}', '{"path": {"index": 1}}']
    bad += ['{"data": {"index": 1}, "file": {}}', '{"data": {"index": 1, "path": "/etc/passwd"}}', "[" * 100_000]
    bad += [json.dumps(good).replace('"steps"', '"stops"'), json.dumps({"noise": good["noise"] | {"sampling": 3}})]
    for said in bad:
        with pytest.raises(ValueError, match="which image it is about"):
            from_page(said)


def test_an_image_of_the_page_is_what_the_model_sees(desk, dropped, photos):
    expected = data.load_images(photos / "03.png", 16)
    assert torch.equal(dropped.load(desk.model, desk.dataset), expected)
    other = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for png in ("", "?", "AAAA", dropped.png[:-40], dropped.png[:60], base64.b64encode(shown.as_png(other)).decode()):
        with pytest.raises(ValueError, match="drop the file again"):
            OfFile("x", png).load(desk.model, desk.dataset)


def test_files_that_are_no_image_are_named(desk, tmp_path, photos):
    def refused(name, said):
        with pytest.raises(ValueError, match=said) as error:
            OfFile.read(tmp_path / name, f"../../{name}", desk.model)
        assert str(tmp_path) not in str(error.value) and name in str(error.value) and ".." not in str(error.value)

    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "half.png").write_bytes((photos / "03.png").read_bytes()[:400])
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "long.png").write_bytes(bytes(MOST_BYTES + 1))
    refused("text.png", "cannot be read")
    refused("empty.jpg", "cannot be read")
    refused("half.png", "cannot be read")
    refused("drawing.svg", "drawing: export it to PNG")
    refused("huge.png", "9000 x 9000 pixels, an image may have 50,000,000")
    refused("long.png", "20 MB, a file may have 20")
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    first = OfFile.read(tmp_path / "moving.gif", "moving.gif", desk.model).load(desk.model, desk.dataset)
    torch.testing.assert_close(first[0, :, 8, 8], torch.tensor([1.0, -1.0, -1.0]))


def test_images_that_give_no_directions_leave_their_sliders_out(model, tmp_path, caplog):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "one.png")
    alone = Desk("x", model, data.ImageFolder(tmp_path, 16, minimum=1), str(tmp_path))
    assert alone.kinds == () and caplog.text.count("no sliders of the kind") == 2
    assert Edit(OfData(0), Place(0.4), (), USUAL).draw(alone).images.shape == (3, 3, 16, 16)


def test_an_animation_shows_its_frames_there_and_back(desk, tmp_path):
    drawn = multi_beta_pictures(desk)["whole path"].draw(desk)
    assert drawn.moving == (4, 5, 6, 7, 6, 5)
    (tmp_path / "path.gif").write_bytes(shown.gif_file(drawn.images[list(drawn.moving)]))
    with Image.open(tmp_path / "path.gif") as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (6, (64, 64), 0)


def test_html_holds_each_image_and_says_what_it_shows(desk):
    drawn = dataclasses.replace(New(2, USUAL).draw(desk), labels=('<b>"1"', "2"), captions=())
    html = shown.as_html(drawn)
    assert html.count("data:image/png;base64,") == 2 and "<b>" not in html
    assert 'alt="&lt;b&gt;&quot;1&quot;"' in html and "&lt;script&gt;" in shown.said("<script>")
