"""Which models and ops can be loaded here: those of a catalog's recipe, and others by name."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from vlm_ops.diagnosis import Finding, failed, refused
from vlm_ops.diagnosis.places import ANSWER_SEC, hub_cache, within

if TYPE_CHECKING:
    from schemas.recipes import OpSpec, Recipe
    from vlm_ops.models import ImageModel
    from vlm_ops.models.settings import ModelSettings

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def judge_hub(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether models of the Hugging Face hub may be fetched (huggingface_hub, `constants.py`). The network is not tried."""
    cache = hub_cache(environment)
    endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    switches = [f"{name}={environment[name]}" for name in _OFFLINE if environment.get(name)]
    if switches and switches[0].partition("=")[2].upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "ok", f"offline ({switches[0]}): models hf:REPO are taken from {cache} alone")
    return Finding("hub", "ok", f"models hf:REPO that are not in {cache} are fetched from {endpoint}")


def check_recipe(
    catalog: str, storage_options: Mapping[str, Any], settings: ModelSettings, load: bool
) -> Iterator[Finding]:
    """Whether each op of a catalog's recipe, with its model in the same revision, can be had here.

    Args:
        settings: Where the models are to run.
        load: Whether to load them and have them encode something, which may fetch them.
    """
    from schemas.catalog import CatalogLayout
    from vlm_ops import storage
    from vlm_ops.states import newest_commit

    layout = CatalogLayout(storage.normalise(catalog))
    try:
        commit = within(lambda: newest_commit(layout, storage_options), ANSWER_SEC)
    except TimeoutError:
        yield Finding("recipe", "unknown", f"the catalog's tables do not answer within {ANSWER_SEC:g} seconds")
        return
    except Exception as error:  # Delta finds credentials, and the region, in its own way
        yield _told("recipe", error)
        return
    if commit is None:
        yield Finding("recipe", "ok", f"no catalog at {layout.root} yet")
        return
    recipe = commit.record.recipe
    yield Finding("recipe", "ok", f"{recipe.recipe_id} of run {commit.record.run_id}: {len(recipe.ops)} ops")
    for name, ops in _by_model(recipe).items():
        yield from _check_ops(name, ops, settings, load)


def check_model(spec: str, settings: ModelSettings, load: bool) -> Iterator[Finding]:
    """Whether a model spec stands for something here; with `load`, whether it works."""
    from vlm_ops.models import describe_model, load_image_model

    try:
        with _network(load):
            info = describe_model(spec, settings)
        sides = [f"images give {', '.join(sorted(info.produces))}"] if info.produces else []
        sides += ["texts give embeddings"] if info.encodes_text else []
        yield Finding(spec, "ok", f"revision {info.revision}; {'; '.join(sides)}")
        if load and info.produces:
            yield _encoded_image(spec, lambda: load_image_model(spec, settings))
        if load and info.encodes_text:
            yield _encoded_text(spec)
    except Exception as error:  # of any model's library
        yield _told(spec, error)


def _check_ops(name: str, ops: Sequence[OpSpec], settings: ModelSettings, load: bool) -> Iterator[Finding]:
    """Those that share a model, or one that has none."""
    from vlm_ops.models import describe_model
    from vlm_ops.ops import check_installed, load_ops

    try:
        with _network(load):
            check_installed(ops, settings)
        if ops[0].model is None:
            if load:
                load_ops(ops, settings)
            yield Finding(name, "ok", "loaded" if load else "can be loaded")
            return
        names = ", ".join(op.name for op in ops)
        yield Finding(name, "ok", f"revision {ops[0].revision}, that of the catalog, for {names}")
        if load:
            yield _encoded_image(name, lambda: cast(Any, load_ops(ops, settings)[0]).model)
            if describe_model(name, settings).encodes_text:
                yield _encoded_text(name)
    except Exception as error:  # of any model's library
        yield _told(name, error)


def _by_model(recipe: Recipe) -> dict[str, list[OpSpec]]:
    """The ops that share a model; those without one by themselves."""
    found: dict[str, list[OpSpec]] = {}
    for op in recipe.ops:
        found.setdefault(op.model or op.name, []).append(op)
    return found


def _encoded_image(spec: str, load: Callable[[], ImageModel]) -> Finding:
    """A black image through a model."""
    import numpy as np

    started = time.perf_counter()
    model = load()
    size = model.preprocessing.size
    pixels = np.zeros((1, 3, size, size), np.uint8)
    model.encode_images(list(pixels) if model.preprocessing.fit == "contain" else pixels)
    told = f"loaded, and encoded an image of {size} x {size} pixels, in {time.perf_counter() - started:.1f} s"
    return Finding(spec, "ok", told)


def _encoded_text(spec: str) -> Finding:
    from vlm_ops.models import load_text_model

    started = time.perf_counter()
    vectors = load_text_model(spec).encode_texts(["a photo"])
    told = f"loaded, and encoded a text into {vectors.shape[1]} dimensions, in {time.perf_counter() - started:.1f} s"
    return Finding(spec, "ok", told)


@contextlib.contextmanager
def _network(may_be_used: bool) -> Iterator[None]:
    """Whether models may be fetched meanwhile from the Hugging Face hub: to describe one that is not there would."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not may_be_used
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _told(name: str, error: Exception) -> Finding:
    """An error as a finding: in its own words, where it is one of ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error.__cause__, OfflineModeIsEnabled) and not constants.HF_HUB_OFFLINE:
        told = "not in the local Hugging Face cache; the first run would fetch it"
        return Finding(name, "warning", told, f"beamsight fetch-model {name} --to DIR, or --load, which fetches it now")
    if isinstance(error, (ValueError, FileNotFoundError)) and "; " in str(error):
        return refused(name, error)
    return failed(name, error, "what it needs may be damaged, or of another version; install or fetch it anew")
