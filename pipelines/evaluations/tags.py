"""`beamsight evaluate tags`: the categories of a tagged catalog, against labels that came with its images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluations.report import Evaluation, Example, first_of_each, mean, metadata_value
from pipelines.options import EvaluateOptions
from schemas.catalog import CatalogLayout
from schemas.tables import INDEX_ROW_COLUMNS
from schemas.taxonomy import Taxonomy
from vlm_ops import storage
from vlm_ops.delta_tables import read_columns
from vlm_ops.metrics import Estimate, bootstrap
from vlm_ops.states import existing_state
from vlm_ops.tag_states import existing_tags
from vlm_ops.taxonomies import load_mapping, load_taxonomy

Path = tuple[str, ...]
_BIN_WIDTH = 0.1


@dataclass(frozen=True)
class Judged:
    """An image with what is true of it and what its tags say.

    Attributes:
        row: For the page.
        truths: Paths of the categories that its label means.
        found: (path, score) of its categories, likeliest first.
    """

    row: Mapping[str, Any]
    truths: tuple[Path, ...]
    found: tuple[tuple[Path, float], ...]

    @property
    def best(self) -> Path:
        """The likeliest category, followed down through the likeliest below it; empty where there is none."""
        path: Path = ()
        while below := [found for found, _ in self.found if len(found) > len(path) and found[: len(path)] == path]:
            path = below[0]
        return path

    def is_right(self, path: Path) -> bool | None:
        """Whether a category is a true one or above one; None below a true one, where nothing is known."""
        if any(truth[: len(path)] == path for truth in self.truths):
            return True
        return None if any(path[: len(truth)] == truth for truth in self.truths) else False


def measure(options: EvaluateOptions) -> Evaluation:
    """Accuracy a tier, precision and coverage as the catalog was tagged, and how often a score is right.

    Raises:
        ValueError: The catalog was tagged with another taxonomy, or no image has a label that is mapped.
        FileNotFoundError: There is no catalog, no tags in it, or no such taxonomy or mapping.
    """
    taxonomy = load_taxonomy(options.taxonomy, options.storage_options)
    mapping = load_mapping(str(options.mapping), taxonomy, options.storage_options)
    catalog = CatalogLayout(storage.normalise(str(options.catalog)))
    recipe, judged, counts = _judged(options, catalog, taxonomy, mapping)
    figures = figures_of(judged)
    examples = {title: first_of_each(section) for title, section in _examples(judged).items()}
    model = f"{recipe.taxonomy} {recipe.taxonomy_version}, tag recipe {recipe.recipe_id}"
    return Evaluation(options.task, model, (str(options.catalog),), counts, figures, examples)


def figures_of(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """Estimates by name; images are resampled.

    An image without categories counts as wrong wherever accuracy is measured. Precision is over what was assigned.
    """
    has_any = np.array([bool(each.found) for each in judged])
    figures = {
        "coverage": bootstrap(has_any.astype(float), mean),
        "lands under the category": bootstrap(np.array([_lands(each) for each in judged], float), mean),
    }
    depths = np.array([min(map(len, each.truths)) for each in judged])
    for tier in range(1, 1 + depths.max()):
        hits = [_hits_tier(each, tier) for each, depth in zip(judged, depths, strict=True) if depth >= tier]
        figures[f"accuracy of tier {tier}"] = bootstrap(np.array(hits, float), mean)
    if has_any.any():
        first = [each.is_right(each.found[0][0]) for each in judged if each.found]
        figures["precision of the first"] = bootstrap(np.array([right is not False for right in first], float), mean)
    scores, rights, owners = _all_categories(judged)
    if len(scores):
        figures["precision of all"] = bootstrap(rights, mean, owners)
        pairs = np.stack([scores, rights], axis=1)
        figures["calibration error"] = bootstrap(pairs, calibration_error, owners)
    for low in np.arange(0, 1, _BIN_WIDTH).round(1):
        here = _in_bin(scores, low)
        if here.any():
            figures[f"right of those scored {low:.1f} to {low + _BIN_WIDTH:.1f}"] = bootstrap(
                rights[here], mean, owners[here]
            )
    return figures


def calibration_error(pairs: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015): how far the share that is right is from the mean score, over bins
    of a tenth, weighted by their size.

    Args:
        pairs: float[n, 2], score and 1 where it is right.
    """
    error = 0.0
    for low in np.arange(0, 1, _BIN_WIDTH).round(1):
        here = pairs[_in_bin(pairs[:, 0], low)]
        if len(here):
            error += len(here) * abs(here[:, 0].mean() - here[:, 1].mean())
    return error / len(pairs)


def _in_bin(scores: np.ndarray, low: float) -> np.ndarray:
    return (scores >= low) & ((scores < low + _BIN_WIDTH) | (low + _BIN_WIDTH >= 1))


def _lands(each: Judged) -> bool:
    return any(each.best[: len(truth)] == truth for truth in each.truths)


def _hits_tier(each: Judged, tier: int) -> bool:
    return any(each.best[:tier] == truth[:tier] for truth in each.truths)


def _all_categories(judged: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, whether it is right, and number of the image, of every category that can be judged."""
    listed = [
        (score, right, number)
        for number, each in enumerate(judged)
        for path, score in each.found
        if (right := each.is_right(path)) is not None
    ]
    scores, rights, owners = zip(*listed, strict=True) if listed else ((), (), ())
    return np.array(scores, float), np.array(rights, float), np.array(owners, int)


def _examples(judged: Sequence[Judged]) -> dict[str, list[Example]]:
    """Images for the page: the surest mistakes, what was left out, and the surest hits."""
    surest = sorted((each for each in judged if each.found), key=lambda each: -each.found[0][1])
    return {
        "Wrong, surest first": [_example(each) for each in surest if not _lands(each)],
        "No category": [_example(each) for each in judged if not each.found],
        "Right, surest first": [_example(each) for each in surest if _lands(each)],
    }


def _example(each: Judged) -> Example:
    found = "; ".join(f"{' > '.join(path)} {score:.2f}" for path, score in each.found) or "none"
    return Example(each.row, f"{found} (label: {' or '.join(' > '.join(truth) for truth in each.truths)})")


def _judged(
    options: EvaluateOptions, catalog: CatalogLayout, taxonomy: Taxonomy, mapping: Mapping[str, Collection[str]]
) -> tuple[Any, list[Judged], dict[str, int]]:
    """The recipe of the tags, the images that have a label and tags, and counts."""
    state = existing_state(catalog, options.storage_options)
    tags = existing_tags(catalog, options.storage_options)
    assert tags.record is not None
    recipe = tags.record.recipe
    if recipe.taxonomy_hash != taxonomy.hash:
        raise ValueError(
            f"{options.catalog} was tagged with {recipe.taxonomy} {recipe.taxonomy_version} ({recipe.taxonomy_hash}), and "
            f"{options.taxonomy!r} is another taxonomy ({taxonomy.hash}); name the one it was tagged with by --taxonomy"
        )
    tables = read_columns(catalog.tags, tags.parts, ("image_id", "categories"), options.storage_options)
    found = {row["image_id"]: _found(row["categories"]) for _, table in tables for row in table.to_pylist()}
    judged, unmapped, num_untagged = [], dict[str, int](), 0
    columns = (*INDEX_ROW_COLUMNS, "source_metadata")
    for row in _rows(read_columns(catalog.images, state.images, columns, options.storage_options)):
        label = metadata_value(row, options.label_field)
        if label is None or label not in mapping:
            unmapped[str(label)] = unmapped.get(str(label), 0) + 1
        elif row["image_id"] not in found:
            num_untagged += 1
        else:
            truths = tuple(taxonomy.by_id[id_].path for id_ in mapping[label])
            judged.append(Judged(row, truths, found[row["image_id"]]))
    if not judged:
        listed = ", ".join(sorted(unmapped)[:10])
        raise ValueError(
            f"no tagged image of {options.catalog} has metadata {options.label_field!r} that {options.mapping} maps "
            f"(there are: {listed}); name the field with --label_field, or add its values to the mapping"
        )
    counts = {
        "images": len(judged),
        "images without a label that is mapped": sum(unmapped.values()),
        "images without tags": num_untagged,
    }
    return recipe, judged, counts


def _rows(tables: Iterator[tuple[Any, pa.Table]]) -> Iterator[dict[str, Any]]:
    for _, table in tables:
        yield from table.to_pylist()


def _found(categories: Sequence[Mapping[str, Any]] | None) -> tuple[tuple[Path, float], ...]:
    return tuple((tuple(each["path"]), each["score"]) for each in categories or ())
