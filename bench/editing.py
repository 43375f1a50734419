"""Two ways to edit, on one model of scenes: encoded at beta, or encoded at 0 and inverted to beta.

    python bench/editing.py scenes32 --betas 0.5 0.7 0.8 0.9 --num-images 500

Edits held-out images along the principal directions of others; the sampler is that of the edits. Appends one JSON line to
editing.jsonl in the folder that --results names.
"""

from __future__ import annotations

import time
from typing import Any

from common import measure
from multibeta import data, load_pretrained, recipes
from multibeta.evaluation import EDITED_BETAS, classifier_features, compare_editing
from multibeta.pipelines import DenoisingMultiBetaVAE

COLUMNS = ("changed", "kept", "outside", "lossless", "frechet")


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("model", help="folder of a trained model of scenes or name of a shipped one; its recipe names the data")
    parser.add_argument("--betas", nargs="+", default=list(EDITED_BETAS), help="where edits happen, auto among them")
    parser.add_argument("--num-images", type=int, default=500, help="images that are edited")
    parser.add_argument("--num-directions", type=int, default=3, help="principal directions, the first ones")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 2.0], help="deviations along each, both ways")
    parser.add_argument("--sampler", help="ode, ode2 or heun; by default the model's own, or ode2")
    parser.add_argument("--steps", type=int, help="up to beta and down again, as many each; by default the model's own")
    parser.add_argument("--device", default="cpu", help="of the model and the classifier")
    arguments = parser.parse_args()

    model = load_pretrained(arguments.model, device=arguments.device)
    if not isinstance(model, DenoisingMultiBetaVAE):
        parser.error(f"a {type(model).__name__} has one way to edit")
    recipe = recipes.from_dict(model.info["recipe"])
    train_set, test_set = recipes.open_data(recipe)
    grid = data.Scenes(recipe.vae.resolution)
    betas = [beta if beta == "auto" else float(beta) for beta in arguments.betas]
    sampling = {"sampler": arguments.sampler, "steps": arguments.steps}
    features = classifier_features(train_set, test_set, device=arguments.device)
    start = time.perf_counter()
    rows = compare_editing(
        model,
        features,
        grid,
        test_set.indices[: arguments.num_images],
        train_set.indices[:1000],
        betas,
        num_directions=arguments.num_directions,
        strengths=arguments.strengths,
        progress=True,
        **sampling,
    )
    print(table(rows))
    facts = {"model": arguments.model, "device": arguments.device, "seconds": time.perf_counter() - start}
    measure.record(arguments.results, "editing.jsonl", {**facts, "classifier_accuracy": features.accuracy, "rows": rows})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as lines of Markdown, numbers with their standard errors."""

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return f"{row[name]:.3g}" + (f" ± {row['error'][name]:.1g}" if name in row["error"] else "")

    lines = [f"| beta | way | strength | {' | '.join(COLUMNS)} | meant |", "| --- " * (4 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = [f"{row['beta']:g}", row["way"], f"{row['strength']:g}", *(cell(row, name) for name in COLUMNS)]
        lines.append(f"| {' | '.join([*cells, ', '.join(row['meant'])])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
