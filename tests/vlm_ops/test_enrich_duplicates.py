"""Images with the same bytes are computed once: in a shard, across shards and across nights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from schemas.recipes import Recipe
from schemas.samples import FileRef, ShardRef, image_id
from tests import toys
from tests.conftest import encode, jpeg, tar_bytes
from vlm_ops import enrich
from vlm_ops.contents import digest_of, write_known_contents
from vlm_ops.delta_tables import LivePart
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.models.settings import CPU
from vlm_ops.ops import plan_ops
from vlm_ops.parts import PartSummary
from vlm_ops.shards import ReadConfig, read_shard

POISON = encode(Image.new("RGB", (16, 16), toys.MAGENTA), "PNG")
MODEL = "python:tests.toys"
RECIPE = Recipe(plan_ops(["quality", "features", "labels", "caption", "embedding"], MODEL), 10**7, 10**7)
MATCHING = Recipe(plan_ops(["caption", "caption_match"], MODEL), 10**7, 10**7)
VECTORS = ("features", "image_embedding")
_OWN = ("image_id", "uri", "shard_uri", "key", "byte_offset", "source_version", "run_id", "duplicate_of")


class Catalog:
    """A catalog below `folder`, and how many images its model has seen."""

    def __init__(self, folder: Path, recipe: Recipe = RECIPE, **changes: object) -> None:
        self.folder = folder
        values = {"batch_size": 4, "num_threads": 2, "settings": CPU} | changes
        self.config = EnrichConfig(str(folder / "catalog"), recipe, "run1", ReadConfig(10**7), **values)  # type: ignore[arg-type]
        self.summaries: list[PartSummary] = []
        self.num_encoded = 0

    def shard(self, name: str, members: Iterable[tuple[str, bytes]]) -> ShardRef:
        data = tar_bytes(members)
        (self.folder / name).write_bytes(data)
        return ShardRef(str(self.folder / name), "tar", "v1", len(data))

    def enrich(self, *shards: ShardRef) -> list[dict]:
        """The rows of the shards."""
        enricher = Enricher(self.config)
        models = {id(op.model): op.model for op in enricher.ops if getattr(op, "model", None)}  # type: ignore[attr-defined]
        for model in models.values():
            model.encode_images = self._counting(model.encode_images)
        summaries = [enricher.enrich(shard) for shard in shards]
        self.summaries += summaries
        return [row for summary in summaries for row in self.rows(summary.name)]

    def rows(self, name: str, table: str = "images") -> list[dict]:
        return pq.read_table(self.folder / "catalog" / table / name).to_pylist()

    def failures(self, shard: ShardRef) -> list[tuple]:
        names = [path.name for path in (self.folder / "catalog" / "failures").glob("*.parquet")]
        rows = [row for name in names for row in self.rows(name, "failures") if row["shard_uri"] == shard.uri]
        return [(row["key"], row["stage"], row["reason"], row["message"]) for row in rows]

    def next_night(self, leaving: Iterable[str] = ()) -> None:
        """What was computed so far is known from now on; images of these URIs are leaving."""
        uri, leaving = str(self.folder / "known.arrow"), list(leaving)
        parts = [LivePart(each.name, each.num_images, each.num_bytes) for each in self.summaries]

        def is_leaving(_: LivePart, table: pa.Table) -> np.ndarray:
            return np.isin(table["uri"].to_pylist(), leaving)

        write_known_contents(uri, f"{self.config.catalog}/images", parts, {}, is_leaving)
        self.config = replace(self.config, known_contents=uri, run_id="run2")
        self.num_encoded = 0

    def _counting(self, encode_images):  # type: ignore[no-untyped-def]
        def counted(pixels: np.ndarray):  # type: ignore[no-untyped-def]
            self.num_encoded += len(pixels)
            return encode_images(pixels)

        return counted


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path)


def contents_of(rows: list[dict], besides: tuple[str, ...] = _OWN) -> list[dict]:
    """What the images' bytes decide, with vectors apart."""
    return [{name: value for name, value in row.items() if name not in (*besides, *VECTORS)} for row in rows]


def assert_same(rows: list[dict], expected: list[dict], besides: tuple[str, ...] = _OWN) -> None:
    assert contents_of(rows, besides) == contents_of(expected, besides)
    for name in VECTORS:
        for row, other in zip(rows, expected, strict=True):
            np.testing.assert_allclose(row[name], other[name], atol=1e-5)


def photos(*seeds: int) -> list[tuple[str, bytes]]:
    return [(f"{i:03}.jpg", jpeg(seed)) for i, seed in enumerate(seeds)]


def id_of(shard: ShardRef, number: int) -> int:
    return image_id(f"{shard.uri}#{number:03}.jpg")


def test_same_bytes_of_a_shard_are_computed_once(catalog: Catalog) -> None:
    seeds = [0, 1, 0, *range(2, 40), 1, 0]  # in one batch, and in batches far apart
    shard = catalog.shard("a.tar", photos(*seeds))
    rows = catalog.enrich(shard)
    assert catalog.num_encoded == 40 and catalog.summaries[0].num_copied == 3
    assert [row["key"] for row in rows] == [f"{i:03}" for i in range(43)]
    named = {i: row["duplicate_of"] for i, row in enumerate(rows) if row["duplicate_of"] is not None}
    assert named == {2: id_of(shard, 0), 41: id_of(shard, 1), 42: id_of(shard, 0)}
    assert_same([rows[2], rows[41], rows[42]], [rows[0], rows[1], rows[0]])
    assert len({row["byte_offset"] for row in rows}) == 43


def test_a_shard_of_nothing_but_copies(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrich, "_MAX_ROWS_PER_BATCH", 7)
    rows = catalog.enrich(catalog.shard("a.tar", photos(*[5] * 40)))
    assert len(rows) == 40 and catalog.num_encoded == 1
    assert len({row["duplicate_of"] for row in rows}) == 2


def test_copies_take_no_place_in_a_batch(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode_batch = enrich.decode_batch
    monkeypatch.setattr(enrich, "decode_batch", lambda s, *rest: (sizes.append(len(s)), decode_batch(s, *rest))[1])
    catalog.enrich(catalog.shard("a.tar", photos(0, 0, 1, 1, 0, 2, 3, 3, 3, 4, 5, 0, 6, 7)))
    assert sorted(sizes) == [4, 4]


def test_copies_of_a_broken_image_fail_alike_without_a_second_attempt(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    decode = enrich.decode
    monkeypatch.setattr(enrich, "decode", lambda data, *limits: (decoded.append(data), decode(data, *limits))[1])
    broken, html = jpeg(1)[:-300], b"<html>404</html>"
    datas = [broken, POISON, html, broken, *[jpeg(seed) for seed in range(2, 12)], POISON, broken, html]
    shard = catalog.shard("a.tar", [(f"{i:03}.jpg", data) for i, data in enumerate(datas)])
    rows = catalog.enrich(shard)
    assert [row["key"] for row in rows] == [f"{i:03}" for i in range(4, 14)]
    failures = catalog.failures(shard)
    assert [(key, stage, reason) for key, stage, reason, _ in failures] == [
        ("000", "decode", "truncated_image"),
        ("001", "features", "model_error"),
        ("002", "decode", "not_an_image"),
        ("003", "decode", "truncated_image"),
        ("014", "features", "model_error"),
        ("015", "decode", "truncated_image"),
        ("016", "decode", "not_an_image"),
    ]
    messages = {key: message for key, _, _, message in failures}
    assert messages["014"] == messages["001"] == "RuntimeError: magenta is poison"
    assert messages["015"] == messages["003"] == messages["000"]
    assert len(decoded) == 13 == len(set(decoded))
    assert catalog.summaries[0].num_copied == 0 and catalog.summaries[0].num_failed_images == 7


def test_what_another_shard_has_is_copied(catalog: Catalog) -> None:
    old = catalog.shard("a.tar", photos(0, 1, 2))
    before = catalog.enrich(old)
    catalog.next_night()
    new = catalog.shard("b.tar", photos(7, 2, 0, 2))
    rows = catalog.enrich(new)
    assert catalog.num_encoded == 1 and catalog.summaries[-1].num_copied == 3
    assert [row["duplicate_of"] for row in rows] == [None, id_of(old, 2), id_of(old, 0), id_of(old, 2)]
    assert_same(rows[1:], [before[2], before[0], before[2]])
    assert [row["uri"] for row in rows] == [f"{new.uri}#{i:03}.jpg" for i in range(4)]
    assert {row["run_id"] for row in rows} == {"run2"} and {row["recipe_id"] for row in rows} == {RECIPE.recipe_id}


def test_copies_of_copies_name_the_first(catalog: Catalog) -> None:
    first = catalog.shard("a.tar", photos(0, 0))
    catalog.enrich(first)
    for name in ("b.tar", "c.tar"):
        catalog.next_night()
        rows = catalog.enrich(catalog.shard(name, photos(0, 0)))
        assert [row["duplicate_of"] for row in rows] == [id_of(first, 0)] * 2


def test_a_moved_file_keeps_its_row_and_names_nobody(catalog: Catalog, tmp_path: Path) -> None:
    def pack(name: str) -> ShardRef:
        (tmp_path / name).write_bytes(jpeg(3))
        return ShardRef(str(tmp_path), "files", "", 0, (FileRef(str(tmp_path / name), "v1", key=name),))

    (before,) = catalog.enrich(pack("old.jpg"))
    catalog.next_night(leaving=[str(tmp_path / "old.jpg")])
    (after,) = catalog.enrich(pack("new.jpg"))
    assert catalog.num_encoded == 0 and catalog.summaries[-1].num_copied == 1
    assert after["duplicate_of"] is None and after["uri"] == str(tmp_path / "new.jpg")
    assert_same([after], [before])


def test_an_image_read_again_does_not_name_itself(catalog: Catalog) -> None:
    shard = catalog.shard("a.tar", photos(0, 1, 1))
    catalog.enrich(shard)
    catalog.next_night()
    rows = catalog.enrich(replace(shard, version="v2"))
    assert catalog.num_encoded == 0
    assert [row["duplicate_of"] for row in rows] == [None, None, id_of(shard, 1)]


def test_a_corpus_sharded_anew_is_copied(catalog: Catalog, tmp_path: Path) -> None:
    seeds = list(range(60))
    before = catalog.enrich(*(catalog.shard(f"old{i}.tar", photos(*seeds[i : i + 20])) for i in (0, 20, 40)))
    catalog.next_night(leaving=[row["uri"] for row in before])
    shuffled = np.random.default_rng(1).permutation(60).tolist()
    shards = [catalog.shard(f"new{i}.tar", photos(*shuffled[i : i + 15])) for i in range(0, 60, 15)]
    rows = catalog.enrich(*shards)
    assert catalog.num_encoded == 0 and sum(each.num_copied for each in catalog.summaries) == 60
    assert {row["duplicate_of"] for row in rows} == {None}
    (tmp_path / "plain").mkdir()
    computing = Catalog(tmp_path / "plain")
    computed = computing.enrich(*shards)
    assert computing.num_encoded == 60
    assert_same(rows, computed, ("run_id",))


def rewrite(catalog: Catalog, change) -> None:  # type: ignore[no-untyped-def]
    (path,) = (catalog.folder / "catalog" / "images").glob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def test_a_hash_that_only_begins_alike_is_not_trusted(catalog: Catalog) -> None:
    catalog.enrich(catalog.shard("a.tar", photos(0, 1)))
    new = catalog.shard("b.tar", photos(2))
    (sample,) = read_shard(new, catalog.config.read)
    forged = enrich.identify(sample).content_sha256[:16] + "0" * 48  # type: ignore[arg-type]

    def with_forged_hash(table: pa.Table) -> pa.Table:
        column = table.schema.get_field_index("content_sha256")
        return table.set_column(column, "content_sha256", pa.array([forged] * 2))

    rewrite(catalog, with_forged_hash)
    catalog.next_night()
    (row,) = catalog.enrich(new)
    assert catalog.num_encoded == 1 and row["duplicate_of"] is None
    assert row["content_sha256"] == enrich.identify(sample).content_sha256  # type: ignore[arg-type]
    assert catalog.summaries[-1].num_copied == 0


def test_rows_of_another_recipe_are_not_copied(catalog: Catalog) -> None:
    old = catalog.shard("a.tar", photos(0))
    catalog.enrich(old)
    catalog.next_night()
    catalog.config = replace(catalog.config, recipe=replace(RECIPE, max_image_pixels=10**6))
    (row,) = catalog.enrich(catalog.shard("b.tar", photos(0)))
    assert catalog.num_encoded == 1 and row["duplicate_of"] == id_of(old, 0)


@pytest.mark.parametrize("fault", ["gone", "cut", "zeroed"])
def test_a_stored_part_that_cannot_be_read_means_computing(
    catalog: Catalog, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = catalog.enrich(catalog.shard("a.tar", photos(*range(10))))
    catalog.next_night()
    path = catalog.folder / "catalog" / "images" / catalog.summaries[0].name
    data = path.read_bytes()
    path.unlink()
    if fault != "gone":
        path.write_bytes(data[:-200] if fault == "cut" else bytes(len(data) // 2) + data[len(data) // 2 :])
    rows = catalog.enrich(catalog.shard("b.tar", photos(*range(10))))
    assert catalog.num_encoded == 10 and catalog.summaries[-1].num_copied == 0
    assert {row["duplicate_of"] for row in rows} == {None}
    assert_same(rows, before)
    assert sum("cannot be read any more" in message for message in caplog.messages) == 1


def captioned(*images: tuple[int, str]) -> list[tuple[str, bytes]]:
    return [
        member
        for i, (seed, caption) in enumerate(images)
        for member in [(f"{i:03}.jpg", jpeg(seed)), (f"{i:03}.txt", caption.encode())]
    ]


def test_an_op_that_reads_captions_is_not_copied_from_other_captions(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path, MATCHING)
    colors = "a red thing", "a green thing", "a blue thing"
    shard = catalog.shard("a.tar", captioned(*[(0, color) for color in colors], (0, colors[0])))
    rows = catalog.enrich(shard)
    scores = [row["source_caption_match"] for row in rows]
    assert sorted(scores[:3]) == [[0.0], [0.0], [1.0]] and scores[3] == scores[0]
    assert catalog.num_encoded == 3 and catalog.summaries[0].num_copied == 1
    assert [row["duplicate_of"] for row in rows] == [None] + [id_of(shard, 0)] * 3

    catalog.next_night()
    again = catalog.enrich(catalog.shard("b.tar", captioned((0, colors[0]), (0, colors[1]), (0, colors[2]))))
    assert [row["source_caption_match"] for row in again] == scores[:3]
    assert catalog.num_encoded == 2 and catalog.summaries[-1].num_copied == 1
    assert {row["duplicate_of"] for row in again} == {id_of(shard, 0)}


def test_the_digest_of_a_part_is_that_of_its_samples(catalog: Catalog) -> None:
    shard = catalog.shard("a.tar", [*photos(0, 1, 0), ("003.jpg", b"<html>"), ("000.jpg", jpeg(4))])
    catalog.enrich(shard)
    (summary,) = catalog.summaries
    assert summary.content_digest == digest_of(read_shard(shard, catalog.config.read))
    other = catalog.shard("a.tar", photos(0, 1, 2))
    assert summary.content_digest != digest_of(read_shard(other, catalog.config.read))


def test_bytes_and_hash_are_there_whatever_ops_are_on(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path, Recipe(plan_ops(["embedding"], MODEL), 10**7, 10**7))
    (row,) = catalog.enrich(catalog.shard("a.tar", photos(3)))
    assert row["num_bytes"] == len(jpeg(3)) and row["width"] is None
    assert row["content_sha256"] == enrich.identify(next(read_shard(ShardRef(row["shard_uri"], "tar", "", 0), catalog.config.read))).content_sha256  # type: ignore[arg-type]  # fmt: skip


PICTURES = [*(jpeg(seed, 24, 16) for seed in range(5)), POISON, jpeg(9)[:-200], b"not an image"]
CAPTIONS = ("a blue sea", "a red cat")
SHARD = st.lists(st.tuples(st.integers(0, len(PICTURES) - 1), st.integers(0, 1)), max_size=14)  # picture, caption


def members_of(images: list[tuple[int, int]]) -> list[tuple[str, bytes]]:
    return [
        member
        for i, (picture, caption) in enumerate(images)
        for member in [(f"{i:03}.jpg", PICTURES[picture]), (f"{i:03}.txt", CAPTIONS[caption].encode())]
    ]


@given(tonight=SHARD, nights=st.lists(SHARD, max_size=2), reads_captions=st.booleans(), is_moved=st.booleans())
@settings(max_examples=25, deadline=None)
def test_rows_and_failures_are_those_of_computing_all(
    tonight: list[tuple[int, int]], nights: list[list[tuple[int, int]]], reads_captions: bool, is_moved: bool
) -> None:
    recipe = MATCHING if reads_captions else RECIPE
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(Path(folder), recipe)
        before: list[dict] = []
        for number, images in enumerate(nights):
            before += catalog.enrich(catalog.shard(f"night{number}.tar", members_of(images)))
            catalog.next_night([row["uri"] for row in before] if is_moved else ())
        shard = catalog.shard("tonight.tar", members_of(tonight))
        rows, failures = catalog.enrich(shard), catalog.failures(shard)
        computed: list[dict] = []
        computed_failures: list[tuple] = []
        for i, image in enumerate(tonight):  # each in a catalog of its own, which can copy nothing
            (Path(folder) / str(i)).mkdir()
            alone = Catalog(Path(folder) / str(i), recipe)
            one = alone.shard("one.tar", members_of([image]))
            computed += alone.enrich(one)
            computed_failures += [(f"{i:03}", *failure[1:]) for failure in alone.failures(one)]
    assert contents_of(rows) == contents_of(computed)
    for name in () if reads_captions else VECTORS:
        for row, other in zip(rows, computed, strict=True):
            np.testing.assert_allclose(row[name], other[name], atol=1e-5)
    assert failures == computed_failures

    in_catalog = {} if is_moved else {row["content_sha256"]: row["image_id"] for row in reversed(before)}
    first = {row["content_sha256"]: row["image_id"] for row in reversed(rows)}
    for row in rows:
        named = in_catalog.get(row["content_sha256"], first[row["content_sha256"]])
        assert row["duplicate_of"] == (None if named == row["image_id"] else named)
    if not reads_captions:
        new = {row["content_sha256"] for row in rows} - {row["content_sha256"] for row in before}
        assert catalog.summaries[-1].num_copied == len(rows) - len(new)
