"""From a shard to its part: order, failures, poison, and going on where a run stopped."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from schemas.recipes import Recipe
from schemas.samples import ShardRef, image_id
from tests import toys
from tests.conftest import encode, jpeg, tar_bytes
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.models import ImageEncoding
from vlm_ops.models.settings import CPU
from vlm_ops.ops import plan_ops
from vlm_ops.shards import ReadConfig

POISON = encode(Image.new("RGB", (16, 16), toys.MAGENTA), "PNG")
RECIPE = Recipe(plan_ops(["quality", "features", "embedding"], "python:tests.toys"), 10**7, 10**7)


def config_for(tmp_path: Path, **changes: object) -> EnrichConfig:
    values = {"run_id": "run1", "batch_size": 8, "num_threads": 3, "settings": CPU} | changes
    return EnrichConfig(str(tmp_path / "catalog"), RECIPE, read=ReadConfig(10**7), **values)  # type: ignore[arg-type]


def shard_of(tmp_path: Path, members: list[tuple[str, bytes]], name: str = "shard.tar") -> ShardRef:
    data = tar_bytes(members)
    (tmp_path / name).write_bytes(data)
    return ShardRef(str(tmp_path / name), "tar", "v1", len(data))


def part_of(tmp_path: Path, name: str, table: str = "images") -> list[dict]:
    return pq.read_table(tmp_path / "catalog" / table / name).to_pylist()


def test_rows_keep_the_order_of_the_shard(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [(f"{i:03}.jpg", jpeg(i)) for i in range(50)])
    advanced: list[tuple[int, int]] = []
    summary = Enricher(config_for(tmp_path)).enrich(shard, lambda images, size: advanced.append((images, size)))
    rows = part_of(tmp_path, summary.name)
    assert [row["key"] for row in rows] == [f"{i:03}" for i in range(50)]
    assert summary.num_images == 50 and not summary.num_failures and summary.run_id == "run1"
    assert sum(images for images, _ in advanced) == 50
    assert rows[7]["image_id"] == image_id(f"{shard.uri}#007.jpg")
    assert {row["recipe_id"] for row in rows} == {RECIPE.recipe_id} and {row["run_id"] for row in rows} == {"run1"}
    assert rows[0]["caption"] is None and len(rows[0]["features"]) == 3
    assert not (tmp_path / "catalog" / "failures").exists()


@pytest.mark.parametrize("ops", [["features", "caption"], ["caption", "features"]], ids="-".join)
def test_the_time_of_captions_is_that_of_their_op(
    ops: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_images = toys.ToyImageModel.encode_images

    def writing_slowly(model: toys.ToyImageModel, pixels: np.ndarray) -> ImageEncoding:
        encoding = encode_images(model, pixels)
        time.sleep(0.5)
        return replace(encoding, caption_sec=0.5)

    monkeypatch.setattr(toys.ToyImageModel, "encode_images", writing_slowly)
    config = replace(config_for(tmp_path), recipe=Recipe(plan_ops(ops, "python:tests.toys"), 10**7, 10**7))
    stage_sec = Enricher(config).enrich(shard_of(tmp_path, [("a.jpg", jpeg(0))])).stage_sec
    assert stage_sec["caption"] >= 0.5 > max(stage_sec["model"], stage_sec["features"])


def test_poison_fails_alone(tmp_path: Path) -> None:
    members = [(f"{i:02}.png", POISON if i in (3, 11, 12) else jpeg(i)) for i in range(20)]
    summary = Enricher(config_for(tmp_path)).enrich(shard_of(tmp_path, members))
    good = [row["key"] for row in part_of(tmp_path, summary.name)]
    assert good == [f"{i:02}" for i in range(20) if i not in (3, 11, 12)]
    failures = part_of(tmp_path, summary.failures_name, "failures")
    assert [(row["key"], row["stage"], row["reason"]) for row in failures] == [
        (key, "features", "model_error") for key in ("03", "11", "12")
    ]
    assert failures[0]["message"] == "RuntimeError: magenta is poison"
    assert summary.num_failed_images == 3


def test_bad_images_are_failures_and_never_placeholders(tmp_path: Path) -> None:
    members = [
        ("a.jpg", jpeg(0)),
        ("b.jpg", b"<html>404</html>"),
        ("c.jpg", b""),
        ("d.jpg", jpeg(1)[:-300]),
        ("e.jpg", jpeg(2)),
    ]
    summary = Enricher(config_for(tmp_path)).enrich(shard_of(tmp_path, members))
    assert [row["key"] for row in part_of(tmp_path, summary.name)] == ["a", "e"]
    assert summary.num_failures == {"not_an_image": 1, "empty_file": 1, "truncated_image": 1}
    offsets = {row["key"]: row["byte_offset"] for row in part_of(tmp_path, summary.failures_name, "failures")}
    assert offsets["b"] > 512


def test_a_finished_part_is_not_computed_again(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [("a.jpg", jpeg(0)), ("b.jpg", b"bad")])
    first = Enricher(config_for(tmp_path)).enrich(shard)
    Path(shard.uri).unlink()  # whoever reads it again, fails
    again = Enricher(config_for(tmp_path, run_id="run2")).enrich(shard)
    assert again == first and (again.run_id, again.num_failures) == ("run1", {"not_an_image": 1})
    assert again.num_bytes > 0 and again.failures_num_bytes > 0


def test_a_crash_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shard_of(tmp_path, [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1))])
    enricher = Enricher(config_for(tmp_path, batch_size=1))

    def broken(*_: object) -> None:
        raise OSError("network down")

    with pytest.raises(OSError, match="network down"):
        enricher.enrich(shard, broken)
    assert [path for path in (tmp_path / "catalog").rglob("*") if path.is_file()] == []
    assert enricher.enrich(shard).num_images == 2


def test_an_empty_shard_has_a_part(tmp_path: Path) -> None:
    summary = Enricher(config_for(tmp_path)).enrich(shard_of(tmp_path, []))
    assert part_of(tmp_path, summary.name) == [] and summary.num_images == 0


def test_many_shards_at_once_share_the_pool(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    shards = [shard_of(tmp_path, [(f"{i}.jpg", jpeg(10 * s + i)) for i in range(30)], f"{s}.tar") for s in range(6)]
    enricher = Enricher(config_for(tmp_path, batch_size=2, num_threads=2))
    with ThreadPoolExecutor(6) as pool:
        summaries = list(pool.map(enricher.enrich, shards))
    assert [summary.num_images for summary in summaries] == [30] * 6
    assert len({summary.name for summary in summaries}) == 6


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    name = b"caf\xe9.jpg"
    with open(bytes(folder) + b"/" + name, "wb") as file:
        file.write(jpeg(0))
    from vlm_ops.inputs import InputConfig, list_inputs, pack

    (shard,) = pack(list_inputs(InputConfig((str(folder),))).files)
    summary = Enricher(config_for(tmp_path)).enrich(shard)
    assert [row["uri"] for row in part_of(tmp_path, summary.name)] == [f"{folder}/caf\\udce9.jpg"]
