"""Which models and ops can be loaded here: those of a catalog's recipe, and others by name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlm_ops.diagnosis import Finding, one_line, refused
from vlm_ops.diagnosis.places import hub_cache, within

if TYPE_CHECKING:
    from schemas.recipes import OpSpec, Recipe

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def judge_hub(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether models may be fetched. The network is not tried."""
    set_to = next((f"{name}={environment[name]}" for name in _OFFLINE if environment.get(name)), None)
    is_offline = set_to is not None and set_to.partition("=")[2].upper() in ("1", "ON", "YES", "TRUE")
    told = f"offline ({set_to}): hf: models come" if is_offline else "not offline: hf: models that are not there come"
    told += " from directories and" if is_offline else " from the network; kept are"
    told += f" those in {hub_cache(environment)}"
    if endpoint := environment.get("HF_ENDPOINT"):
        told += f"; HF_ENDPOINT={endpoint}"
    return Finding("hub", "ok", told)


def check_recipe(catalog: str, storage_options: Mapping[str, Any], device: str, load: bool) -> Iterator[Finding]:
    """Whether each op of a catalog's recipe, with its model in the same revision, can be had here.

    Args:
        device: Where the models are to run.
        load: Whether to load them and have them encode something.
    """
    from schemas.catalog import CatalogLayout
    from vlm_ops import storage
    from vlm_ops.states import newest_commit

    layout = CatalogLayout(storage.normalise(catalog))
    try:
        commit = within(lambda: newest_commit(layout, storage_options))
    except Exception as error:  # which the check of the storage has told at length
        yield Finding("recipe", "unknown", f"the catalog cannot be read: {one_line(error)}")
        return
    if commit is None:
        yield Finding("recipe", "ok", f"no catalog at {layout.root} yet")
        return
    recipe = commit.record.recipe
    yield Finding("recipe", "ok", f"{recipe.recipe_id} of run {commit.record.run_id}: {len(recipe.ops)} ops")
    for name, ops in _by_model(recipe).items():
        yield from _check_ops(name, ops, device, load)


def check_model(spec: str, device: str, load: bool) -> Iterator[Finding]:
    """Whether a model spec stands for something here; with `load`, whether it works."""
    from vlm_ops.models import describe_model

    try:
        info = describe_model(spec)
    except Exception as error:
        yield _failed(spec, error)
        return
    sides = [f"images give {', '.join(sorted(info.produces))}"] if info.produces else []
    sides += ["texts give embeddings"] if info.encodes_text else []
    yield Finding(spec, "ok", f"revision {info.revision}; {'; '.join(sides)}")
    if load:
        yield from _load(spec, info.produces, info.encodes_text, device)


def _by_model(recipe: Recipe) -> dict[str, list[OpSpec]]:
    """The ops that share a model; those without one by themselves."""
    found: dict[str, list[OpSpec]] = {}
    for op in recipe.ops:
        found.setdefault(op.model or op.name, []).append(op)
    return found


def _check_ops(name: str, ops: list[OpSpec], device: str, load: bool) -> Iterator[Finding]:
    from vlm_ops.models import describe_model
    from vlm_ops.ops import check_installed, load_ops

    try:
        check_installed(ops)
        if ops[0].model is None:
            if load:
                load_ops(ops, device)
            yield Finding(name, "ok", "can be loaded" if not load else "loaded")
            return
    except Exception as error:
        yield _failed(name, error)
        return
    yield Finding(name, "ok", f"revision {ops[0].revision}, as in the catalog, for {', '.join(op.name for op in ops)}")
    if load:
        info = describe_model(name)
        yield from _load(name, info.produces, info.encodes_text, device)


def _load(spec: str, produces: frozenset[str], encodes_text: bool, device: str) -> Iterator[Finding]:
    """One black image, and one text, through the model."""
    import numpy as np

    from vlm_ops.models import load_image_model, load_text_model

    name = f"{spec}, loaded"
    try:
        started = time.perf_counter()
        if produces:
            model = load_image_model(spec, device)
            size = model.preprocessing.size
            pixels: Any = np.zeros((1, 3, size, size), np.uint8)
            model.encode_images([pixels[0]] if model.preprocessing.fit == "contain" else pixels)
            yield Finding(name, "ok", f"encoded an image of {size} x {size} pixels, {_since(started)} in all")
        started = time.perf_counter()
        if encodes_text:
            vector = load_text_model(spec, "cpu").encode_texts(["a photo"])
            yield Finding(name, "ok", f"encoded a text into {vector.shape[1]} dimensions, {_since(started)} in all")
    except Exception as error:
        yield _failed(name, error)


def _failed(name: str, error: Exception) -> Finding:
    """In its own words, where it is one of ours; else with its kind."""
    if isinstance(error, (ValueError, FileNotFoundError)) and "; " in str(error):
        return refused(name, error)
    return Finding(name, "problem", one_line(error), "BEAMSIGHT_DEBUG=1 shows where; or name another model")


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"
