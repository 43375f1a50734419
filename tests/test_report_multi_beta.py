"""The report: one page that needs nothing else, numbers that are those of the page, an old report that outlives a failure."""

import dataclasses
import html.parser
import json
import re

import pytest
import torch
from PIL import Image

from browser import WIDTHS, visited
from multibeta import evaluation, recipes
from multibeta.data import Scenes, to_float
from multibeta.evaluation import described_training
from multibeta.flow_map import FlowMap
from multibeta.metrics import FactorClassifier
from multibeta.multibeta_vae import VAEConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, process_statistics
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.report import facts as report_facts
from multibeta.report import multi_beta
from multibeta.report.few_steps import few_samplings, few_steps_section
from multibeta.report.page import number
from multibeta.report.write import introduction, write_report
from multibeta.schedules import beta_to_step
from report_pages import PAGE_BYTES, check_sliders, most_bytes

SECTIONS = [
    *("facts", "representation", "factors", "reconstructions", "samples", "sharpness"),
    *("directions", "interpolations", "heads", "training", "environment"),
]
STEPS = 20
SHAPE = {"base_channels": 8, "num_res_blocks": 1, "num_groups": 4}
RECIPE = dataclasses.replace(
    recipes.find("scenes32-small"),
    name="tiny <b>",  # a name is text, not markup
    data=recipes.DataOptions(source="scenes", num_train=40, num_test=16),
    vae=VAEConfig(
        resolution=16, channel_multipliers=(1, 2), mid_attention=False, embedding_channels=16, num_steps=STEPS, **SHAPE
    ),
    diffusion=DiffusionConfig(channel_multipliers=(1,), attention_resolutions=(), head_channels=8, **SHAPE),
)


def samplings(*rows):
    """Ways to denoise, of (sampler, steps, sign of delta)."""
    return [dict(zip(("sampler", "steps", "delta_sign"), row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def model():
    """Random weights, a process that fits its encoder, and a recipe."""
    vae, diffusion = recipes.build(RECIPE)
    images = to_float(Scenes(16).images(range(0, 320000, 20000)))
    with torch.no_grad():
        diffusion.set_process(vae.sigmas(), *process_statistics(vae.encode, images, STEPS, nodes=10))
    info = {"recipe": json.loads(json.dumps(recipes.to_dict(RECIPE))), "command": "multibeta train --recipe 'a & b'"}
    return DenoisingMultiBetaVAE(vae, diffusion, info)


@pytest.fixture(scope="module", autouse=True)
def untrained_judge():
    """A classifier that is not trained, few samplers and steps: what they measure is not the report's to test."""

    def features(train_set, test_set, *, steps, progress):
        network = FactorClassifier(test_set.factor_sizes, resolution=16, width=8).eval()
        accuracy = dict.fromkeys(test_set.factor_names, 0.5)
        return evaluation.Features("features of a classifier", lambda x: network.features(x).detach(), network, accuracy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.features, "classifier_features", features)
        patch.setattr("multibeta.pipelines.multi_beta.USUAL_STEPS", 2)
        patch.setattr(multi_beta, "QUICK_SAMPLINGS", samplings(("ode2", 5, 1), ("resample", 5, -1), ("ode2", STEPS + 1, 1)))
        yield


@pytest.fixture(scope="module")
def written(model, untrained_judge, tmp_path_factory):
    """A report of the scenes, with the training's records: its folder and numbers."""
    folder = tmp_path_factory.mktemp("report")
    for stage, keys in (("vae", ("loss", "mse", "sigma_zero")), ("diffusion", ("noise_error", "delta_error"))):
        (folder / stage).mkdir()
        records = [{"step": step, **dict.fromkeys(keys, 1 / step)} for step in (20, 40)] + [{"step": 40, "validation/loss": 1.0}]
        lines = [json.dumps(record) for record in records] + ['{"step": 60, "lo']  # the last is being written
        (folder / stage / "metrics.jsonl").write_text("\n".join(lines))
    numbers = write_report(model, folder / "page.html", quick=True, progress=False, training_folder=folder)
    return folder, numbers


class Page(html.parser.HTMLParser):
    """Images, addresses and identifiers of a page, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.images, self.addresses, self.identifiers, self.tags, self.open = [], [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "srcset", "data", "action") if name in attributes]
        self.identifiers += [attributes["id"]] if "id" in attributes else []
        if tag not in ("img", "input", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(written):
    return (written[0] / "page.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(text):
    page = Page(text)
    assert not page.open
    assert not page.tags & {"link", "iframe", "object"}
    assert text.count("<script") == text.count("<script>") == 1
    assert len(page.images) == 17
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)


def test_a_page_is_small_however_large_its_images(text):
    assert len(text) < most_bytes(text) < most_bytes(text, more_pictures=5) < PAGE_BYTES  # four of a flow map, one of two models


def test_sliders_show_what_they_are_moved_to(chromium, written):
    address = (written[0] / "page.html").as_uri()
    assert check_sliders(chromium, address) == 3
    for width in WIDTHS:
        with visited(chromium, address, width) as visit:
            assert visit.overflow == 0


def test_every_section_is_there_in_order(text):
    assert Page(text).identifiers == SECTIONS


def test_directions_are_counted_as_by_the_command_line(text):
    rows = re.findall(r">(\d+) · \d+%", text)
    assert rows == 2 * [str(index) for index in range(8)]  # of the slider, and of the rows


def test_every_image_says_what_it_shows(text):
    assert all(image["alt"] for image in Page(text).images)


def test_numbers_are_those_of_the_json_file(written):
    folder, numbers = written
    assert json.loads((folder / "page.json").read_text()) == numbers
    assert sorted(path.name for path in folder.iterdir()) == ["diffusion", "page.html", "page.json", "vae"]


def test_the_page_shows_its_numbers(written, text):
    numbers = written[1]
    shown = [row["frechet"] for row in numbers["generation"]["samples"]] + [fact["value"] for fact in numbers["facts"]]
    shown += [row[made]["sharpness"] for row in numbers["headline"] for made in ("direct", "denoised")]
    assert all(f"<td>{number(value)}</td>" in text for value in shown)


def test_samplers_with_more_steps_than_the_grid_are_left_out(written):
    assert [(row["steps"], row["delta_sign"]) for row in written[1]["generation"]["samples"]] == [(5, 1), (5, -1)]


def test_names_and_commands_are_text(text):
    assert "tiny &lt;b&gt;" in text and "<b>image</b>" in text
    assert "a &amp; b" in text


def user_model(model, name="scenes32", **changes):
    """A model that says that it was trained by a preset with other values of some sections."""
    preset = recipes.find(name)
    sections = {section: dataclasses.replace(getattr(preset, section), **values) for section, values in changes.items()}
    recipe = json.loads(json.dumps(recipes.to_dict(dataclasses.replace(preset, **sections))))
    return DenoisingMultiBetaVAE(model.vae, model.diffusion, {"recipe": recipe, "command": "multibeta train"})


def test_a_report_names_the_images_and_the_steps_of_the_model_and_not_those_of_its_preset(model, written):
    changes = {
        "data": {"source": "/home/ada/cats", "num_train": None},
        "vae_training": {"steps": 123},
        "diffusion": {"dropout": 0.1},
    }
    facts = report_facts.model_facts(user_model(model, **changes))
    numbers = evaluation.json_ready(written[1] | {"model": facts})
    text = introduction(numbers, multi_beta.SYSTEM)
    for shown in (
        "<td>scenes32</td>",
        "<td>/home/ada/cats</td>",
        "123 steps VAE, 3,000 steps diffusion",
        "data.source /home/ada/cats, in the recipe scenes",
        "vae_training.steps 123, in the recipe 4000",
        "diffusion.dropout 0.1, in the recipe 0.0",
    ):
        assert shown in text
    title = described_training(facts)
    assert title == ("recipe scenes32 (changed: data.source, vae_training.steps, diffusion.dropout), trained on /home/ada/cats")
    for part in (text, title, json.dumps(facts)):
        assert "built-in scenes" not in part and "60 minutes" not in part


def test_an_unchanged_recipe_has_no_changes(model):
    facts = report_facts.model_facts(user_model(model))
    assert facts["changed"] == {} and described_training(facts) == "recipe scenes32, trained on scenes"
    shipped = report_facts.model_facts(
        DenoisingMultiBetaVAE.from_pretrained("scenes32")
    )  # of a preset that has more fields today
    assert shipped["changed"] == {} and shipped["trained_on"] == "scenes" and shipped["training_steps"] == [4000, 3000]


@pytest.mark.parametrize("info", [{}, {"recipe": None}, {"recipe": "my own"}, {"recipe": {"name": "my own"}}])
def test_what_is_not_recorded_is_not_told(model, info):
    bare = DenoisingMultiBetaVAE(model.vae, model.diffusion, info)
    facts = report_facts.model_facts(bare)
    assert (facts["changed"], facts["trained_on"], facts["training_steps"]) == (None, None, None)
    named = bool(info.get("recipe"))
    assert facts["recipe"] == ("my own" if named else None)
    assert described_training(facts) == ("recipe my own" if named else "no recipe recorded")
    assert report_facts.chosen_recipe(bare, None).data.source == "scenes" and not report_facts.is_own(bare, RECIPE, range(3))


def test_a_recorded_folder_that_is_gone_is_named_with_what_replaces_it(model, tmp_path):
    gone = user_model(model, data={"source": str(tmp_path / "gone")})
    with pytest.raises(
        FileNotFoundError, match=r"the model records .*gone as its data, .*name other images with source \(--data\)"
    ):
        write_report(gone, tmp_path / "page.html", progress=False)
    with pytest.raises(FileNotFoundError) as error:
        write_report(gone, tmp_path / "page.html", str(tmp_path / "other"), progress=False)
    assert "records" not in str(error.value) and "other" in str(error.value)


@pytest.mark.parametrize(("recorded", "now", "own"), [("a", "a", True), ("a", "b", False), (None, "b", True), ("a", None, True)])
def test_held_out_images_are_those_of_the_training_while_the_images_are_the_same(model, recorded, now, own):
    trained = user_model(model)
    trained.info["images"] = {"training": 48, "held_out": 12, "fingerprint": recorded}
    images = type("Images", (), {"fingerprint": now})
    assert report_facts.is_own(trained, recipes.find("scenes32"), images) == own


def test_factors_are_judged_where_they_are_known(written, text):
    numbers = written[1]
    assert "wall hue" in text and "chance" in text
    assert all(len(row["denoised"]["accuracy"]) == len(Scenes.factor_names) for row in numbers["headline"])
    assert numbers["data"]["own_split"] and "not trained with this split" not in text


def test_codes_and_factors_are_shown_at_every_beta(written, text):
    rows = written[1]["disentanglement"]
    assert [row["beta"] for row in rows] == [row["beta"] for row in written[1]["spectrum"]]
    for row in rows:
        assert list(row["information"]) == list(Scenes.factor_names)
        shown = (row["mig"], row["mig_random_rotation"], *row["information"].values(), row["information_by_chance"])
        cells = "".join(f"<td>{number(value)}</td>" for value in shown)
        assert f"<td>{row['beta']:g}</td>{cells}</tr>" in text
    assert "has 64 positions" in text and "16 held-out images" in text and "no β is selected" in text


def test_edits_are_shown_at_the_auto_beta_of_a_model_that_knows_it(model, written, text):
    assert "0.7, then" in text and "multibeta spectrum" in text and "(auto)" not in text
    assert written[1]["directions"]["beta"] == 0.7
    known = DenoisingMultiBetaVAE(model.vae, model.diffusion, dict(model.info))
    levels = [dict.fromkeys(("nats", "mse", "denoised_mse"), 1.0) | {"beta": b, "identity": 1 - b / 10} for b in (0.0, 1.0)]
    known.info["spectrum"] = {"num_images": 40, "levels": levels}
    numbers = {"model": report_facts.model_facts(known), "walk": {"sampler": "ode2", "steps": 2}, "quick": True}
    assert numbers["model"]["auto_beta"] == 0.5
    images = to_float(Scenes(16).images(range(4)))
    assert "β = 0.5 (auto), then" in multi_beta.directions_section(numbers, known, images, images[:2])
    assert numbers["directions"]["beta"] == 0.5
    shown = multi_beta.interpolation_section(numbers, known, images)
    assert re.findall(r"β = [\d.]+(?: \(auto\))?<", shown) == 3 * [f"β = {b}<" for b in ("0", "0.3", "0.5 (auto)", "0.6", "0.9")]
    table = multi_beta.representation_section(written[1]["spectrum"], known, 0.5)
    assert "<td><b>0.5, auto</b></td><td>1.00</td><td>1.00</td><td>1.00</td><td>0.950</td>" in table
    assert multi_beta.fact_rows(numbers["model"])[-1] == ("Edits at", "β = 0.5 (auto)")


def test_a_vector_latent_is_not_called_spatial(written):
    numbers = written[1] | {"model": written[1]["model"] | {"latent_shape": [8, 1, 1]}}
    assert "positions" not in multi_beta.factors_section(numbers)


def test_steps_with_a_sigma_per_channel_are_steps_of_the_vae(model):
    recipe = recipes.untied(RECIPE, "untied")
    untied = DenoisingMultiBetaVAE(model.vae, model.diffusion, {"recipe": recipes.to_dict(recipe)})
    assert report_facts.model_facts(untied)["training_steps"] == [RECIPE.vae_training.steps, RECIPE.diffusion_training.steps]


def aligned_codes(count=2000):
    """Two factors of four values, and codes that are these factors, (N, 2, 1, 1)."""
    factors = torch.randint(0, 4, (count, 2), generator=torch.Generator().manual_seed(0))
    return factors, factors.float()[:, :, None, None]


def test_rotated_channels_lose_the_gap_of_aligned_ones():
    factors, codes = aligned_codes()
    (row,) = evaluation.disentanglement({0.5: codes}, factors, ("a", "b"))
    assert row["beta"] == 0.5 and row["mig"] > 0.99
    assert row["mig_random_rotation"] < 0.6
    assert row["information"] == pytest.approx({"a": 1, "b": 1})
    assert 0 < row["information_by_chance"] < 0.01


def test_collapsed_codes_tell_nothing():
    factors, codes = aligned_codes()
    (row,) = evaluation.disentanglement({1.0: 0 * codes}, factors, ("a", "b"))
    assert row == {
        **{"beta": 1.0, "mig": 0, "mig_random_rotation": 0, "information_by_chance": 0},
        "information": {"a": 0, "b": 0},
    }


def test_factors_that_never_change_are_left_out():
    factors, codes = aligned_codes()
    factors[:, 0] = 1
    (row,) = evaluation.disentanglement({0.5: codes}, factors, ("a", "b"))
    assert row["information"].keys() == {"b"}
    assert evaluation.disentanglement({0.5: codes}, 0 * factors, ("a", "b")) == []


def test_a_single_code_has_no_gap():
    factors, codes = aligned_codes()
    assert evaluation.disentanglement({0.5: codes[:, :1]}, factors, ("a", "b")) == []


def test_a_folder_of_images_is_measured_without_factors(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for index, image in enumerate(Scenes(16).images(range(0, 300000, 10000)).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    path = tmp_path / "new" / "folder.html"
    numbers = write_report(model, path, str(tmp_path / "images"), quick=True, progress=False)
    text = path.read_text(encoding="utf-8")
    assert Page(text).identifiers == [name for name in SECTIONS if name != "factors"]
    assert numbers["disentanglement"] == []
    assert numbers["generation"]["features"] in text and "pixels" in numbers["generation"]["features"]
    assert "not trained with this split" in text and "No factors" in text and "wall hue" not in text
    assert "No records of the training" in text
    assert (numbers["data"]["train_images"], numbers["data"]["held_out_images"]) == (24, 6)


def test_paths_that_cannot_take_a_page_are_refused_before_any_work(model, tmp_path):
    for path in (tmp_path, tmp_path / "page.json", tmp_path / "page.txt"):
        with pytest.raises(ValueError, match="name of an HTML file"):
            write_report(model, path, progress=False)


def test_a_model_without_a_recipe_is_measured_on_scenes(model):
    recipe = report_facts.chosen_recipe(DenoisingMultiBetaVAE(model.vae, model.diffusion), None)
    assert recipe.data.source == "scenes" and recipe.vae.resolution == 16


@pytest.mark.parametrize("schedule", ["linear", "sinusoidal", "sinusoidal_squared"])
def test_heads_are_labelled_with_the_beta_that_was_encoded(schedule, monkeypatch):
    config = dataclasses.replace(RECIPE.vae, schedule=schedule)
    model = DenoisingMultiBetaVAE(*recipes.build(dataclasses.replace(RECIPE, vae=config)))
    images, encoded = to_float(Scenes(16).images(range(8))), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda images, beta: (encoded.append(beta), encode(images, beta))[1])
    rows = evaluation.head_fit(model, images, betas=(0.05, 0.5, 0.9))
    assert [row["beta"] for row in rows] == encoded[::2]
    assert encoded[::2] == pytest.approx((0.05, 0.5, 0.9), abs=0.04)  # what the grid of 20 steps has nearest
    steps = [beta_to_step(beta, STEPS, schedule) for beta in encoded]
    assert [here - before for here, before in zip(steps[::2], steps[1::2], strict=True)] == [1, 1, 1]


def test_heads_of_a_coarse_grid_are_measured_once_at_each_of_its_steps():
    coarse = DenoisingMultiBetaVAE(*recipes.build(dataclasses.replace(RECIPE, vae=dataclasses.replace(RECIPE.vae, num_steps=4))))
    rows = evaluation.head_fit(coarse, to_float(Scenes(16).images(range(8))))
    assert [row["beta"] for row in rows] == [0.25, 0.5, 0.75, 1.0]


def test_a_grid_of_few_steps_is_walked_in_as_many(written):
    """The report's own walk has 20 steps."""
    model = DenoisingMultiBetaVAE(*recipes.build(dataclasses.replace(RECIPE, vae=dataclasses.replace(RECIPE.vae, num_steps=1))))
    assert model.sampling_options() == {"sampler": "ode2", "steps": 1}
    assert written[1]["walk"] == {"sampler": "ode2", "steps": 2}


def test_samplers_that_a_model_has_not_are_refused_before_any_work(model):
    sets = Refusing(), Refusing()
    for wrong, message in (
        (("ddim", 5, 1), "sampler of a DenoisingMultiBetaVAE must be one of"),
        (("ode2", STEPS + 1, 1), "steps must lie between 1 and 20"),
        (("ode2", -5, 1), "steps must lie between 1 and 20"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate_multi_beta(model, *sets, samplings=samplings(("ode2", 5, 1), wrong))
        with pytest.raises(ValueError, match=message):
            evaluation.generation(model, None, None, None, samplings(("ode2", 5, 1), wrong))
    with pytest.raises(ValueError, match="sign of delta must be 1 or -1, got 0"):
        evaluation.generation(model, None, None, None, samplings(("ode2", 5, 0)))


class Refusing:
    """A dataset that must not be looked at."""

    def __len__(self):
        return 40

    def images(self, indices):
        raise AssertionError("measured")


def test_json_holds_no_infinite_numbers():
    assert evaluation.json_ready({"a": (1, float("nan")), "b": [float("inf"), "x"]}) == {"a": [1, None], "b": [None, "x"]}


def test_few_evaluations_of_a_flow_map_are_shown_beside_its_sampler(model):
    assert few_samplings(model) == [] and few_steps_section(model, {}) == ""
    model.flow_map = FlowMap.of(model.diffusion.unet, model.diffusion.config, STEPS, span_channels=8)
    try:
        asked = few_samplings(model)
        assert [row["steps"] for row in asked] == [1, 2, 4, 8] and {row["sampler"] for row in asked} == {"ode2"}
        rows = [*asked, *({"sampler": name, "steps": steps} for name in ("map", "map_noise") for steps in (1, 2))]
        samples = [{"latents": "prior", "frechet": 1.0, **row} for row in rows]
        content = few_steps_section(model, {"samples": samples, "autoencoder_floor": 0.5})
    finally:
        model.flow_map = None
    assert all(f"{title} evaluation" in content for title in ("map, 1", "map, 2", "map_noise, 4", "ode2, 2"))
    assert content.count("<img") == 5  # the curve, and four blocks of images
