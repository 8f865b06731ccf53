"""`beamsight tag`: from the rows of a catalog to alt text, keywords, categories, suitability and ad slots.

Reads the `images` table alone, and no picture. What is new or changed since the last time is tagged, the rest stays;
one transaction makes all of it visible.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import apache_beam as beam
import pyarrow as pa

from pipelines.corpora import encode_corpus
from pipelines.dataflow_jobs import LostJobError
from pipelines.jobs import run_to_end
from pipelines.options import ReadingOptions, TagOptions
from pipelines.progress import watching
from pipelines.runners import beam_options
from pipelines.transforms import ListedWork, PublishTags, TagParts
from schemas.catalog import RUN_METRICS, RUN_REPORT, RUN_WORK, CatalogLayout
from schemas.recipes import Recipe
from schemas.samples import FILES_PER_SHARD, digest
from schemas.tags import TagRecipe
from schemas.taxonomy import Taxonomy
from vlm_ops import storage
from vlm_ops.ad_slots import rules_in_force
from vlm_ops.categories import CategoryScorer, calibrate
from vlm_ops.category_calibration import CategoryCalibration
from vlm_ops.cores import usable_cores
from vlm_ops.delta_tables import LivePart
from vlm_ops.image_evidence import columns_needed, embeddings_of, evidence_of
from vlm_ops.models.settings import CPU, resolve_device
from vlm_ops.ops import check_installed
from vlm_ops.run_manifests import new_run_id
from vlm_ops.states import existing_state
from vlm_ops.suitability import suitability_rules, topic_embeddings
from vlm_ops.tag_parts import TagPlan, TagWork, num_unknown, plan_tags
from vlm_ops.tag_publishing import TagPublishConfig
from vlm_ops.tag_report import write_tag_report
from vlm_ops.tag_states import existing_tags, tag_state
from vlm_ops.tag_statistics import describe_tags, tag_lines
from vlm_ops.tagging import TagConfig
from vlm_ops.taxonomies import load_mapping, load_taxonomy
from vlm_ops.work_lists import write_work_list

logger = logging.getLogger(__name__)

_MANY_IMAGES = 10_000  # from which on the start of further processes pays
_SPEAKING_OPS = ("labels", "caption", "embedding")  # those whose columns speak for categories


def run(options: TagOptions) -> int:
    """Tags what is new or changed.

    Raises:
        FileNotFoundError: There is no catalog, or no such taxonomy, mapping or calibration.
        ValueError: One of these is not valid, or the catalog's encoder is not the one that is installed.
    """
    if options.device != "auto":
        resolve_device(options.device)
    catalog, storage_options = CatalogLayout(storage.normalise(options.catalog)), options.storage_options
    state, tags = existing_state(catalog, storage_options), tag_state(catalog, storage_options)
    assert state.commit is not None
    taxonomy = load_taxonomy(options.taxonomy, storage_options)
    recipe = state.commit.record.recipe
    calibration = _calibration(options, taxonomy, recipe)
    config = _config(options, catalog, taxonomy, calibration, recipe)
    revision = digest(config.run_id)[:8] if options.all else ""
    plan = plan_tags(state.images, tags.parts, config.recipe, revision)
    if options.dry_run:
        print(_forecast(plan, catalog, storage_options))
        return 0
    is_current = not plan.work and tags.record is not None and set(plan.kept) == set(tags.parts)
    if is_current:
        print(f"all {state.commit.record.num_images} images of {catalog.root} are tagged already; --all tags them anew")
        return 0
    publish = TagPublishConfig(
        catalog=catalog.root,
        recipe=config.recipe,
        run_id=config.run_id,
        revision=revision,
        sequence=tags.sequence,
        images_version=state.commit.version,
        images_run_id=state.commit.record.run_id,
        storage_options=storage_options,
    )
    started = time.perf_counter()
    pipeline = beam.Pipeline(options=beam_options("tag", options))
    config = replace(config, num_processes=_num_processes(options, plan))
    listed = write_work_list(catalog.run_file(config.run_id, RUN_WORK), plan.work, storage_options)
    work = pipeline | "Parts" >> ListedWork(listed, TagWork.from_json, storage_options)
    _ = work | "Tag" >> TagParts(config) | "Publish" >> PublishTags(publish)
    amounts = {each.name: each.num_rows for each in plan.work}
    is_running_on = False
    try:
        with watching("tag", amounts, lambda: storage.names_in(catalog.tags, storage_options)):
            is_running_on = run_to_end(pipeline) is None
    except LostJobError:
        is_running_on = True
        raise
    finally:
        if not is_running_on:
            storage.remove(listed.uri, storage_options)
    if is_running_on:
        return 0
    wall_sec = time.perf_counter() - started
    print(_summary(catalog, config, state.images, wall_sec))
    return 0


def _num_processes(options: TagOptions, plan: TagPlan) -> int:
    """Further processes to be started; other runners have their own, and each would load a language model."""
    num_threads, num_images = options.num_threads or usable_cores(), sum(each.num_rows for each in plan.work)
    is_worth_it = num_threads > 1 and num_images >= _MANY_IMAGES
    return num_threads if is_worth_it and options.runner == "local" and not options.text_model else 0


def _config(
    options: TagOptions,
    catalog: CatalogLayout,
    taxonomy: Taxonomy,
    calibration: CategoryCalibration | None,
    recipe: Recipe,
) -> TagConfig:
    """Everything a worker needs; texts of the taxonomy are encoded here, once."""
    encoder = recipe.encoder
    scorer = looks = None
    if encoder is None:
        logger.warning("%s has no embeddings (--ops embedding), so its images get no categories", catalog.root)
    else:
        settings = replace(CPU, trust_remote_code=options.trust_remote_code)
        check_installed([encoder], settings)
        scorer = CategoryScorer.compute(
            taxonomy, str(encoder.model), calibration, options.min_score, options.max_categories, settings
        )
        looks = topic_embeddings(str(encoder.model))
    text_model = None
    if options.text_model:
        from vlm_ops.text_writer import text_writer_identity  # heavy, and seldom needed

        text_model = text_writer_identity(options.text_model)
    today = datetime.now(UTC).date()
    tag_recipe = TagRecipe(
        taxonomy=taxonomy.name,
        taxonomy_version=taxonomy.version,
        taxonomy_hash=taxonomy.hash,
        categories=scorer.fingerprint if scorer else None,
        suitability=suitability_rules().rules_id,
        ad_slots=rules_in_force(today),
        text_model=text_model,
    )
    return TagConfig(
        catalog=catalog.root,
        recipe=tag_recipe,
        run_id=new_run_id(),
        scorer=scorer,
        looks=looks,
        text_model=options.text_model,
        device=options.device,
        on=today,
        storage_options=options.storage_options,
    )


def _calibration(options: TagOptions, taxonomy: Taxonomy, recipe: Recipe) -> CategoryCalibration | None:
    """The one that is named, fitted anew where it is to be; None where none is named."""
    if options.calibration is None:
        return None
    uri = storage.normalise(options.calibration)
    if options.calibrate:
        fitted = _fitted(options, taxonomy, recipe)
        storage.write_bytes(uri, fitted.to_json().encode(), options.storage_options)
        logger.info("calibrated on %d images: %s", fitted.num_images, options.calibration)
        return fitted
    try:
        text = storage.read_bytes(uri, options.storage_options).decode()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no calibration {options.calibration!r}; --calibrate PATTERN --mapping FILE makes it of labelled images"
        ) from error
    return CategoryCalibration.from_json(text, options.calibration)


def _fitted(options: TagOptions, taxonomy: Taxonomy, recipe: Recipe) -> CategoryCalibration:
    """A calibration on labelled images, which are encoded by the ops of the catalog."""
    if recipe.encoder is None:
        raise ValueError(f"{options.catalog} has no embeddings (--ops embedding), so there is nothing to calibrate")
    mapping = load_mapping(str(options.mapping), taxonomy, options.storage_options)
    rows = _encoded_like(recipe, options)
    evidences = evidence_of(rows)
    truths = [mapping.get(str(each.metadata.get(options.label_field)), ()) for each in evidences]
    if not any(truths):
        labels = sorted({str(each.metadata.get(options.label_field)) for each in evidences})
        raise ValueError(
            f"no image of {' '.join(options.calibrate)} has a {options.label_field!r} that {options.mapping} maps; theirs are "
            f"{', '.join(labels[:10])}; name the field with --label_field"
        )
    _, embeddings = embeddings_of(rows)
    settings = replace(CPU, trust_remote_code=options.trust_remote_code)
    return calibrate(taxonomy, str(recipe.encoder.model), embeddings, evidences, truths, settings)


def _encoded_like(recipe: Recipe, options: TagOptions) -> pa.RecordBatch:
    """Rows of the labelled images, as the catalog would have them."""
    reading = ReadingOptions(
        input=options.calibrate,
        input_format="auto",
        uri_column=None,
        image_column=recipe.image_column,
        caption_field=recipe.caption_field,
        allowed_schemes=(),
        files_per_shard=FILES_PER_SHARD,
        storage_options=options.storage_options,
        model=str(recipe.encoder and recipe.encoder.model),
        device=options.device,
        batch_size=None,
        num_threads=options.num_threads,
        max_image_bytes=recipe.max_image_bytes,
        max_image_pixels=recipe.max_image_pixels,
    )
    ops = [name for name in _SPEAKING_OPS if recipe.op(name)]
    table, _ = encode_corpus(reading, options.calibrate, ops, columns_needed())
    return table.combine_chunks().to_batches()[0]


def _summary(catalog: CatalogLayout, config: TagConfig, images: Sequence[LivePart], wall_sec: float) -> str:
    """What a person is told at the end; writes the report too."""
    options = config.storage_options
    tags = existing_tags(catalog, options)
    assert tags.record is not None
    described = describe_tags(catalog, images, options)
    lines = tag_lines(described, catalog.root)
    metrics = json.loads(storage.read_bytes(catalog.run_file(config.run_id, RUN_METRICS), options))
    rate = metrics["images_tagged"] / max(wall_sec, 1e-6)
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in metrics["stage_sec"].items())
    facts = [("run", config.run_id), ("images", tags.record.num_images), ("tagged now", tags.record.num_tagged)]
    names = plan_tags(images, tags.parts, config.recipe).names
    write_tag_report(catalog, config.run_id, names, tags.parts, facts, options)
    return "\n".join(
        [
            f"catalog    {catalog.root}",
            f"tagged     {metrics['images_tagged']} images, {metrics['images_kept']} as they were",
            *lines,
            f"speed      {rate:.0f} images/s, {wall_sec:.1f} s",
            f"stages     {stages} (thread-seconds)",
            f"report     {catalog.run_file(config.run_id, RUN_REPORT)}",
        ]
    )


def _forecast(plan: TagPlan, catalog: CatalogLayout, storage_options: storage.StorageOptions) -> str:
    """What a run would do."""
    num_tagged = sum(num_unknown(catalog, work, storage_options) for work in plan.work)
    num_images = sum(work.num_rows for work in plan.work) + sum(part.num_rows for part in plan.kept)
    return f"{catalog.root}: would tag {num_tagged} images, {num_images - num_tagged} would stay as they are"


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("tag", sys.argv[1:]))
