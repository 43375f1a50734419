"""The command that says what each beta keeps of an image."""

from dataclasses import dataclass

from multibeta import data, recipes
from multibeta.caches import why_not_writable
from multibeta.cli.arguments import SHIPPED, Model, OnModel, Source, Switch, require_at_least
from multibeta.cli.images import open_for
from multibeta.evaluation import of_recorded_data, recorded_recipe, source_of
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline, resolve_pretrained
from multibeta.pipelines.spectrum import KEPT_IDENTITY, MEASURED, SPECTRUM_IMAGES, with_row_at


@dataclass(frozen=True, kw_only=True)
class Spectrum(OnModel):
    """What each beta of a multi-beta VAE keeps of an image, and the highest one at which edits keep what it is, its auto beta.

    Without a flag it shows what the model knows of itself, which `train` measures at its end. --save measures anew and writes
    that into the config.json of the model, --data shows it for other images.
    """

    model: Model = SHIPPED
    data: Source = None  # Images to measure on; by default those that the model held out from its own data.
    num_images: int = SPECTRUM_IMAGES  # How many of them.
    save: Switch = False  # Measure, and keep it with the model: edits then start from its auto beta.
    upscale: Switch = False  # Accept images smaller than the model's.

    def run(self) -> None:
        require_at_least(1, num_images=self.num_images)
        model = self.load(denoising=False)
        if not isinstance(model, DenoisingMultiBetaVAE):
            raise ValueError(f"{self.model} holds a {type(model).__name__}, which has one representation and no beta")
        if self.save and (reason := why_not_writable(resolve_pretrained(self.model))) is not None:
            raise ValueError(f"--save writes into the folder of the model, {resolve_pretrained(self.model)}: {reason}")
        if self.save or self.data is not None or model.spectrum is None:
            dataset = measured_images(model, self.data, upscale=self.upscale)
            images = data.to_float(dataset.images(data.choose(len(dataset), self.num_images)))
            model.measure_spectrum(images, progress=True)
        print(spectrum_table(model))
        if self.save:
            folder = resolve_pretrained(self.model)
            model.save_info(folder)
            print(f"{folder}: saved in its config.json")


def measured_images(model: Pipeline, source: str | None, *, upscale: bool) -> data.Dataset:
    """The images of a source; without one those that the model held out, or where it held none out those of its training."""
    with of_recorded_data(source_of(model, source, "--data"), source, "--data"):
        recorded = recorded_recipe(model)
        if source is not None or "vae" not in recorded:
            return open_for(model, source_of(model, source, "--data"), upscale=upscale)
        training, held_out = recipes.open_data(recipes.from_dict(recorded))
        return held_out if len(held_out) else training


def spectrum_table(model: DenoisingMultiBetaVAE) -> str:
    """What a model knows of each beta as a small table, the auto beta among them."""
    rows, auto = model.spectrum, model.auto_beta
    assert rows is not None
    lines = [f"{'beta':>5} {'nats':>8} {'mse':>9} {'denoised':>9} {'identity':>9}"]
    for row in with_row_at(rows, auto):
        beta, nats, mse, denoised_mse, identity = (row[name] for name in MEASURED)
        mark = "  auto" if beta == auto else ""
        lines.append(f"{beta:5g} {nats:8.1f} {mse:9.5f} {denoised_mse:9.5f} {identity:9.3f}{mark}")
    lines += [
        "nats: information kept, the KL to the prior; mse: of an image decoded at beta; denoised: of its mean, denoised and",
        "decoded at 0, as edits are; identity: the share of the detail at beta 0 that then comes back",
        f"auto: the highest beta up to which identity stays at {KEPT_IDENTITY:g} or above; edits start there",
    ]
    return "\n".join(lines)
