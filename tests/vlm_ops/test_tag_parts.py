"""Which parts of the tags are made anew, and which stay."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from schemas.catalog import CatalogLayout, part_name
from schemas.samples import digest
from schemas.tags import TAGS, TagRecipe
from vlm_ops.delta_tables import LivePart
from vlm_ops.tag_parts import is_tagged, plan_tags, read_tag_summary, rows_by_image, write_tags

RECIPE = TagRecipe("toy", "1", "0" * 12, "c", "s", "a", None)
OTHER = TagRecipe("toy", "2", "1" * 12, "c", "s", "a", None)


def images_part(place: str, content: str, num_rows: int = 10) -> LivePart:
    return LivePart(part_name(f"s{digest(place)}-{digest(content)[:12]}", "a" * 12), num_rows, 1)


def tagged(images: list[LivePart], recipe: TagRecipe = RECIPE) -> list[LivePart]:
    return [LivePart(work.name, work.num_rows, 1) for work in plan_tags(images, [], recipe).work]


A, B = images_part("a", "1"), images_part("b", "1")


def test_all_is_new_at_first() -> None:
    plan = plan_tags([A, B], [], RECIPE)
    assert [work.images_part for work in plan.work] == [A.name, B.name]
    assert not plan.kept
    assert plan.names == {work.name: work.images_part for work in plan.work}


def test_what_is_tagged_stays() -> None:
    tags = tagged([A, B])
    plan = plan_tags([A, B], tags, RECIPE)
    assert not plan.work
    assert set(plan.kept) == set(tags)
    assert is_tagged([A, B], tags, RECIPE)


def test_a_copy_with_another_review_is_the_same_part() -> None:
    (part,) = tagged([A])
    copy = LivePart(part_name(str(part.shard_id), str(part.recipe_id), "12345678"), 10, 1)
    assert plan_tags([A], [copy], RECIPE).kept == (copy,)


def test_a_changed_shard_is_tagged_with_its_old_rows_at_hand() -> None:
    tags, changed = tagged([A, B]), images_part("a", "2")
    plan = plan_tags([changed, B], tags, RECIPE)
    (work,) = plan.work
    assert work.images_part == changed.name
    assert work.earlier == (tags[0].name,)
    assert plan.kept == (tags[1],)


def test_what_left_the_images_leaves_the_tags() -> None:
    tags = tagged([A, B])
    plan = plan_tags([B], tags, RECIPE)
    assert not plan.work
    assert plan.kept == (tags[1],)
    assert not is_tagged([B], tags, RECIPE)


def test_another_recipe_or_all_makes_all_anew() -> None:
    tags = tagged([A, B])
    for plan in (plan_tags([A, B], tags, OTHER), plan_tags([A, B], tags, RECIPE, "12345678")):
        assert len(plan.work) == 2
        assert not plan.kept
        assert not any(work.earlier for work in plan.work)
        assert not {work.name for work in plan.work} & {part.name for part in tags}


def test_parts_without_rows_have_no_tags() -> None:
    assert not plan_tags([images_part("a", "1", 0)], [], RECIPE).work


def test_a_part_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    catalog, (work,) = CatalogLayout(str(tmp_path)), plan_tags([A], [], RECIPE).work
    rows = pa.RecordBatch.from_pylist([{"image_id": 1, "uri": "a", "row_hash": "x", "run_id": "r"}], TAGS)

    def broken():
        yield rows, 0
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_tags(catalog, work, broken(), {}, {}, "r")
    assert read_tag_summary(catalog, work.name, {}) is None
    written = write_tags(catalog, work, iter([(rows, 1), (rows, 0)]), {"texts": 1.0}, {}, "r")
    assert (written.num_rows, written.num_kept, written.run_id) == (2, 1, "r")
    found = read_tag_summary(catalog, work.name, {})
    assert found is not None
    assert (found.num_rows, found.num_kept, found.stage_sec, found.num_bytes) == (
        2,
        1,
        {"texts": 1.0},
        written.num_bytes,
    )
    assert found == written
    assert write_tags(catalog, work, iter([(rows, 0)]), {}, {}, "later") == written, (
        "who comes second takes what is there"
    )
    assert list(rows_by_image(catalog, [work.name, "part-gone.parquet"], {})) == [(1, "x")]
