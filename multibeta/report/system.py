"""What a report needs to know of a system of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from multibeta.report.page import Curves


@dataclass(frozen=True)
class System:
    """A class of models that has a report: how it is measured, and what its page shows.

    Attributes:
        title, lead: The heading of the page and what stands below it, HTML.
        preset: Name of the recipe that stands in for a model without one.
        num_images, quick_images: Held-out images that are measured.
        curves, training_caption: Of the section of the training.
        sampling: (model, quick) to the sampling options of the figures.
        rendered: beta to what an image is called that was decoded at once, and one that was denoised.
        measure: As `measure` of either module: the numbers of the page.
        sections: (numbers, model, train_set, test_set) to what makes each section, in their order.
        findings: Numbers to the sentences that say what came out.
        facts, fact_rows: What only models of this class have to say of themselves, as numbers and as rows of a table.
    """

    title: str
    lead: str
    preset: str
    num_images: int
    quick_images: int
    curves: Sequence[Curves]
    training_caption: str
    sampling: Callable[[Any, bool], dict]
    rendered: Callable[[float | None], tuple[str, str]]
    measure: Callable[..., dict]
    sections: Callable[..., list[Callable[[], str]]]
    findings: Callable[[dict], list[str]]
    facts: Callable[[Any], dict]
    fact_rows: Callable[[dict], list[tuple[str, str]]]
