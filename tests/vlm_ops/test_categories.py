"""Categories of images whose colours are known, by a toy model, and of real texts by the default one."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.tags import Category, ImageEvidence, Label
from vlm_ops.categories import CategoryScorer, TextVectors, calibrate, softmax, words_of
from vlm_ops.category_calibration import CategoryCalibration, log_odds, sigmoid
from vlm_ops.models import load_text_model
from vlm_ops.taxonomies import parse_yaml

TOY = "python:tests.toys"
COLORS = parse_yaml(
    """\
name: Colours
version: "1"
nodes:
- {id: w, name: Warm}
- {id: r, name: Red things, parent: w, prompts: [a red picture, a red wall]}
- {id: o, name: Orange things, parent: w, prompts: [a red green picture]}
- {id: g, name: Green things, prompts: [a green picture]}
- {id: b, name: Blue things, prompts: [a blue picture]}
- {id: s, name: Secrets, sensitive: true, prompts: [a red green blue picture]}
- {id: t, name: Worse secrets, parent: s, prompts: [a blue red picture]}
- {id: l, name: red law, visible: false}
""",
    "colours",
)
AXES = np.eye(3, dtype=np.float32)
IMAGES = {"red": AXES[0], "green": AXES[1], "blue": AXES[2]}


@pytest.fixture(autouse=True)
def cache(own_cache: None) -> None:
    """Prompts of toys do not belong into the user's cache."""


def scorer(threshold: float = 0.3, max_categories: int = 5, **changes: object) -> CategoryScorer:
    calibration = dataclasses.replace(
        CategoryCalibration(f"{TOY}@1", {"image": 12.0, "labels": 6.0, "caption": 4.0, "source_metadata": 14.0}),
        **changes,
    )
    return CategoryScorer.compute(COLORS, TOY, calibration, threshold, max_categories)


def evidence(**values: object) -> ImageEvidence:
    return ImageEvidence(1, "uri", **values)  # type: ignore[arg-type]


def assign(image: np.ndarray, made: ImageEvidence, **options: object) -> tuple[Category, ...]:
    (found,) = scorer(**options).assign(np.array([image]), [made])  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("color", "ids"), [("red", ["w", "r"]), ("green", ["g"]), ("blue", ["b"])])
def test_a_picture_is_what_its_prompts_say(color: str, ids: list[str]) -> None:
    found = assign(IMAGES[color], evidence(), threshold=0.2)  # a blue picture may be of a man in a blue shirt
    assert [each.id for each in found] == ids
    assert found[0].evidence == ("image",) and found[0].path == COLORS.by_id[ids[0]].path
    assert all(0.2 <= each.score <= 1 for each in found)


def test_it_abstains_under_the_threshold_and_keeps_to_the_number() -> None:
    assert assign(IMAGES["red"], evidence(), threshold=0.9999) == ()
    assert [each.id for each in assign(IMAGES["red"], evidence(), max_categories=1)] == ["w"]
    assert len(assign(IMAGES["red"], evidence(), threshold=0.0, max_categories=50)) == 6  # all but secrets


def test_an_image_without_an_embedding_has_no_category() -> None:
    missing = np.full(3, np.nan, np.float32)
    assert assign(missing, evidence(caption="a red picture")) == ()
    both = scorer().assign(np.array([missing, IMAGES["red"]]), [evidence(), evidence()])
    assert not both[0] and both[1]
    assert scorer().assign(np.empty((0, 3), np.float32), []) == []


def test_which_evidence_spoke() -> None:
    texts = evidence(
        labels=(Label("red car", 0.9),), caption="something blue", metadata={"title": "Red!", "colour": "green"}
    )
    (root, red) = assign(IMAGES["red"], texts)
    assert red.evidence == ("source_metadata", "image", "labels") and root.evidence == red.evidence
    plain = np.zeros(3, np.float32)
    assert assign(plain, evidence(caption="green"), threshold=0.1)[0].evidence == ("caption",)
    assert {each.id for each in assign(plain, evidence(source_captions=("it is blue",)), threshold=0.2)} == {"b"}


def test_labels_in_the_metadata_are_no_evidence() -> None:
    """They are what the categories are measured with."""
    told = scorer().assign(np.array([IMAGES["red"]]), [evidence(metadata={"label": "blue", "title": 5})])
    assert told == scorer().assign(np.array([IMAGES["red"]]), [evidence()])


def test_what_pictures_do_not_show_needs_a_text_that_came_with_them() -> None:
    assert "l" not in {each.id for each in assign(IMAGES["red"], evidence(caption="red law"), threshold=0.0)[:3]}
    plain = np.zeros(3, np.float32)
    found = assign(plain, evidence(metadata={"title": "red law"}), threshold=0.01, max_categories=20)
    (law,) = [each for each in found if each.id == "l"]
    assert law.evidence == ("source_metadata",)


def test_secrets_are_never_assigned() -> None:
    assert not {"s", "t"} & {node.id for node in scorer().nodes}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1, 1, width=32)] * 3), min_size=1, max_size=6), st.floats(0, 1))
def test_a_child_is_never_likelier_than_its_parent(rows: list[tuple[float, float, float]], threshold: float) -> None:
    made = scorer(threshold, 50, points=((0.1, 0.05), (0.5, 0.7), (0.9, 0.7)))
    for found in made.assign(np.array(rows, np.float32), [evidence(caption="red and green")] * len(rows)):
        scores = {each.id: each.score for each in found}
        assert (
            all(0 <= score <= 1 for score in scores.values()) and list(scores.values()) == sorted(scores.values())[::-1]
        )
        for id_, score in scores.items():
            parent = COLORS.by_id[id_].parent
            assert parent is None or (scores[parent] >= score and list(scores).index(parent) < list(scores).index(id_))


def test_a_batch_is_scored_as_its_rows_are() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    told = [evidence(caption=f"a {color} thing", labels=(Label(color, 0.5),)) for color in [*IMAGES, "plain"] * 5]
    together = scorer(0.1).assign(rows, told)
    for row, each, found in zip(rows, told, together, strict=True):
        (alone,) = scorer(0.1).assign(row[None], [each])
        assert [(c.id, c.evidence) for c in alone] == [(c.id, c.evidence) for c in found]
        assert np.allclose([c.score for c in alone], [c.score for c in found], atol=1e-5)


def test_probabilities_by_the_formula() -> None:
    """Against one image, one prompt at a time."""
    made = scorer()
    texts = load_text_model(TOY)
    vector = 12 * IMAGES["red"] + 4 * (texts.encode_texts(["green"])[0] + texts.encode_texts(["tree"])[0]) / 2
    spoken = made.evidence_vectors(IMAGES["red"][None], [evidence(caption="the green tree")])
    found = made.prompt_probabilities(spoken)[0]
    logits = np.array(
        [vector @ prompt if shown else -np.inf for prompt, shown in zip(made.prompts, made.visible, strict=True)]
    )
    assert np.allclose(found, softmax(logits[None])[0], atol=1e-5)
    red = next(number for number, node in enumerate(made.nodes) if node.id == "r")
    assert np.isclose(made.node_probabilities(found[None])[0, red], found[made.members[:, red]].sum(), atol=1e-5)


def test_a_prompt_of_two_categories_speaks_for_both() -> None:
    shared = parse_yaml(
        "name: t\nnodes:\n- {id: 1, name: A, prompts: [red]}\n- {id: 2, name: B, prompts: [red, blue]}\n", "t"
    )
    neutral = CategoryCalibration.neutral(f"{TOY}@1")
    (found,) = CategoryScorer.compute(shared, TOY, neutral).assign(IMAGES["red"][None], [evidence()])
    assert {each.id for each in found} == {"1", "2"}


def test_a_worker_needs_no_more_than_the_pickle() -> None:
    made = scorer()
    told = [evidence(caption="red")]
    before = made.assign(IMAGES["red"][None], told)
    travelled = pickle.loads(pickle.dumps(made))
    assert travelled.assign(IMAGES["red"][None], told) == before


def test_the_fingerprint_names_what_decides() -> None:
    base = scorer()
    assert base.fingerprint == scorer().fingerprint
    others = [scorer(0.31), scorer(max_categories=4), scorer(points=((0.2, 0.3),))]
    prompts = dataclasses.replace(
        COLORS, nodes=(*COLORS.nodes[:-1], dataclasses.replace(COLORS.nodes[-1], visible=True))
    )
    others.append(CategoryScorer.compute(prompts, TOY, base.calibration, 0.3))
    assert len({base.fingerprint, *(each.fingerprint for each in others)}) == 5


def test_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer()
    monkeypatch.setattr("vlm_ops.categories.load_text_model", lambda *_: pytest.fail("it encoded again"))
    assert scorer().prompts.shape == (len(scorer().members), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"the threshold must be in \[0, 1\], got 1.5"),
        ({"max_categories": 0}, "at least one category must be allowed, got 0"),
        (
            {"model": "compact@1"},
            f"the calibration was made with compact@1, and the catalog with {TOY}@1; calibrate again",
        ),
    ],
)
def test_mistakes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer(**options)


def test_models_without_texts_and_taxonomies_without_nodes_to_assign() -> None:
    with pytest.raises(ValueError, match="has no text side; its images cannot be compared with categories"):
        CategoryScorer.compute(COLORS, "torchvision:resnet50")
    secret = parse_yaml("name: t\nnodes:\n- {id: 1, name: A, sensitive: true}\n", "t")
    with pytest.raises(ValueError, match="every node of t is sensitive, so that none can be assigned"):
        CategoryScorer.compute(secret, TOY)


def test_words() -> None:
    assert words_of("The red-brown DOG's 3 balls, and a b") == ["red", "brown", "dog", "balls"]
    assert len(words_of("word " * 10_000)) == 200 and words_of("") == []


def test_vectors_of_texts_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_ops.categories._MAX_CACHED_TEXTS", 3)
    vectors, model = TextVectors(TOY, 3), load_text_model(TOY)
    for texts in (["red", "a"], ["b", "red"], ["c", "d"], ["red"]):
        found = vectors.weighted_sums([[(text, 2.0)] for text in texts], as_mean=False)
        assert np.allclose(found, 2 * model.encode_texts(texts))


# --- calibration --------------------------------------------------------------------------------------


def labelled(num: int = 60, share_wrong: float = 0.2) -> tuple[np.ndarray, list[ImageEvidence], list[set[str]]]:
    """Images of three colours; the labels of some are wrong."""
    rng = np.random.default_rng(0)
    ids = ["r", "g", "b"]
    kinds = rng.integers(0, 3, num)
    vectors = AXES[kinds] + rng.normal(0, 0.3, (num, 3)).astype(np.float32)
    truths = [{ids[kind if rng.random() > share_wrong else (kind + 1) % 3]} for kind in kinds]
    return vectors.astype(np.float32), [evidence(caption="a picture")] * num, truths


def test_calibrated_scores_are_as_often_right_as_they_say() -> None:
    vectors, told, truths = labelled(600)
    calibration = calibrate(COLORS, TOY, vectors[:300], told[:300], truths[:300])
    assert calibration.is_fitted and calibration.num_images == 300 and calibration.model == f"{TOY}@1"
    found = CategoryScorer.compute(COLORS, TOY, calibration, 0.0, 50).assign(vectors[300:], told[300:])
    pairs = [(each.score, each.id in truth) for image, truth in zip(found, truths[300:], strict=True)
             for each in image if each.id in "rgb"]  # fmt: skip
    scores, rights = np.array(pairs, float).T
    sure = scores > 0.6
    assert abs(scores[sure].mean() - rights[sure].mean()) < 0.05 and sure.sum() > 200


def test_a_calibration_is_read_back() -> None:
    calibration = calibrate(COLORS, TOY, *labelled())
    assert CategoryCalibration.from_json(calibration.to_json()) == calibration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"image": 1}}, "c.json is no calibration of categories"),
        ({"points": [[0.5, 0.5], [0.4, 0.6]]}, "c.json has a weight that is no number, or points that do not rise"),
        ({"points": [[0.5, 1.0]]}, "c.json has a weight that is no number, or points that do not rise"),
        ({"means": {"image": [float("nan")]}}, "c.json has a weight that is no number"),
    ],
)
def test_damaged_calibrations(change: dict, message: str) -> None:
    values = {**json.loads(CategoryCalibration.neutral("m").to_json()), **change}
    with pytest.raises(ValueError, match=message):
        CategoryCalibration.from_json(json.dumps(values), "c.json")
    with pytest.raises(ValueError, match="c.json is no calibration"):
        CategoryCalibration.from_json("[]", "c.json")


def test_too_few_images_and_unknown_categories() -> None:
    vectors, told, truths = labelled(30)
    with pytest.raises(ValueError, match="5 images with a category are too few to calibrate; give at least 20"):
        calibrate(COLORS, TOY, vectors, told, [*truths[:5], *[set()] * 25])
    with pytest.raises(ValueError, match="category 's' of Colours cannot be assigned; map the label to another"):
        calibrate(COLORS, TOY, vectors, told, [{"s"}, *truths[1:]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_probabilities_keep_the_order_of_scores(scores: list[float]) -> None:
    calibration = dataclasses.replace(CategoryCalibration.neutral("m"), points=((0.05, 0.1), (0.3, 0.5), (0.9, 0.5)))
    found = calibration.probability(np.sort(scores))
    assert (np.diff(found) >= 0).all() and (found >= 0).all() and (found <= 1).all()
    assert np.allclose(sigmoid(log_odds(np.array([0.2]))), 0.2)
