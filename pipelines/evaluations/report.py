"""What an evaluation has found, and how it is shown: as a table, as JSON, as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.options import EvaluateOptions, model_settings
from vlm_ops.image_evidence import metadata_of
from vlm_ops.metrics import Estimate
from vlm_ops.models import describe_model
from vlm_ops.pages import Section, card, render_gallery

_NUM_EXAMPLES = 12


@dataclass(frozen=True)
class Example:
    """One image of the page: its row, what was asked of it, and how that went."""

    row: Mapping[str, Any]
    text: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        figures: Estimates by name, such as `text->image R@10`.
        counts: What they were measured on.
        examples: For the page, by the title of their section.
    """

    task: str
    model: str
    inputs: tuple[str, ...]
    counts: dict[str, int]
    figures: dict[str, Estimate]
    examples: dict[str, list[Example]] = field(default_factory=dict, repr=False)


def evaluation_of(
    options: EvaluateOptions,
    counts: dict[str, int],
    figures: dict[str, Estimate],
    examples: Mapping[str, Sequence[Example]],
) -> Evaluation:
    """Of all examples, the first ones of each section, and no image twice in a section."""
    shown = {title: first_of_each(section) for title, section in examples.items()}
    return Evaluation(
        options.task, describe_model(options.model, model_settings(options)).name, options.input, counts, figures, shown
    )


def best_and_worst(examples: Sequence[Example]) -> dict[str, Sequence[Example]]:
    """Both ends of examples that come best first."""
    return {"Best": examples, "Worst": examples[::-1]}


def mean(values: np.ndarray) -> float:
    """The statistic of most figures."""
    return float(values.mean())


def metadata_value(row: Mapping[str, Any], name: str) -> str | None:
    """What the metadata of an image say in a field; None where they say nothing, or no single value."""
    value = metadata_of(row["source_metadata"]).get(name)
    return None if value is None or isinstance(value, (dict, list)) else str(value)


def as_table(evaluation: Evaluation) -> str:
    """For a person: each figure with its 95 % interval."""
    counts = ", ".join(f"{count} {name}" for name, count in evaluation.counts.items())
    lines = [f"{evaluation.task} of {' '.join(evaluation.inputs)} ({counts})", f"by {evaluation.model}", ""]
    width = max(map(len, evaluation.figures), default=0)
    for name, figure in evaluation.figures.items():
        value, low, high = _digits(figure)
        lines.append(f"{name:<{width}}  {value:>8}  95 % of resamples in [{low}, {high}]")
    return "\n".join(lines)


def as_json(evaluation: Evaluation) -> str:
    """For a program."""
    return json.dumps(
        {
            "task": evaluation.task,
            "model": evaluation.model,
            "inputs": evaluation.inputs,
            "counts": evaluation.counts,
            "figures": {name: asdict(figure) for name, figure in evaluation.figures.items()},
        }
    )


def as_page(evaluation: Evaluation, options: EvaluateOptions) -> str:
    """Examples, to look at."""
    sections = []
    for title, examples in evaluation.examples.items():
        cards = [card({**example.row, "caption": example.text}, options.storage_options) for example in examples]
        sections.append(Section(title, cards))
    facts = [("model", evaluation.model), ("inputs", " ".join(evaluation.inputs)), *evaluation.counts.items()]
    digits = {name: _digits(each) for name, each in evaluation.figures.items()}
    table = [(name, value, f"[{low}, {high}]") for name, (value, low, high) in digits.items()]
    return render_gallery(f"Beamsight {evaluation.task}", facts, sections, table)


def _digits(figure: Estimate) -> tuple[str, str, str]:
    """Value and bounds, with as many digits as tell an interval from 1."""
    places = 5 if 0.9995 <= figure.value < 0.999995 else 3
    return f"{figure.value:.{places}f}", f"{figure.low:.{places}f}", f"{figure.high:.{places}f}"


def first_of_each(examples: Sequence[Example]) -> list[Example]:
    """The first ones that a page has room for, and no image twice."""
    of_image: dict[int, Example] = {}
    for example in examples:
        of_image.setdefault(example.row["image_id"], example)
        if len(of_image) == _NUM_EXAMPLES:
            break
    return list(of_image.values())
