from __future__ import annotations

import csv
import dataclasses
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.tags import Box, FoundText, ImageEvidence, Label
from tests.conftest import DATA
from vlm_ops.suitability import LEVELS, TopicEmbeddings, judge, suitability_rules, topic_embeddings

ALCOHOL, ARMS, ADULT = "pg0WhF", "avbNf2", "Rm3SiT"
PAGE = Box(0.0, 0.0, 1.0, 1.0)
# An image of which everything was looked at, and nothing is sensitive.
HARMLESS = ImageEvidence(
    1, "a.jpg", labels=(Label("tabby", 0.9),), caption="a cat on a sofa", caption_source="generated", caption_score=0.9,
    texts=(), nsfw_score=0.01,
)  # fmt: skip


def judged(**fields):
    return judge([dataclasses.replace(HARMLESS, **fields)])[0]


def of_title(title):
    return judged(metadata={"title": title})


def test_low_only_where_everything_was_looked_for_and_nothing_was_found():
    actual = judged()
    assert (actual.level, actual.topics, actual.doubts) == ("low", (), ())
    assert actual.evidence == ("nothing sensitive was found",)


@pytest.mark.parametrize(
    ("fields", "doubt"),
    [
        ({"nsfw_score": None}, "adult content was not looked for (--ops safety)"),
        ({"texts": None}, "text in the picture was not looked for (--ops ocr)"),
        ({"labels": (), "caption": None}, "what the picture shows was not looked for (--ops labels,caption)"),
    ],
)
def test_no_level_where_something_was_not_looked_for(fields, doubt):
    actual = judged(**fields)
    assert actual.level is None
    assert doubt in actual.doubts


def test_what_was_not_looked_for_leaves_floor_and_high_standing_but_not_medium():
    assert judged(nsfw_score=None, metadata={"title": "hardcore sex"}).level == "floor"
    assert judged(nsfw_score=None, metadata={"title": "cocaine"}).level == "high"
    assert judged(nsfw_score=None, metadata={"title": "a bottle of vodka"}).level is None


@pytest.mark.parametrize(
    ("score", "level", "num_topics"),
    [(0.19, "low", 0), (0.2, None, 0), (0.79, None, 0), (0.8, "high", 1), (0.96, "floor", 1)],
)
def test_adult_content_by_its_score(score, level, num_topics):
    actual = judged(nsfw_score=score)
    assert actual.level == level
    assert [topic.id for topic in actual.topics] == [ADULT] * num_topics
    assert any(f"adult content score {score:.2f}" in doubt for doubt in actual.doubts) == (score >= 0.2)


def test_labels_speak_when_the_model_is_sure_and_are_a_doubt_before():
    sure = judged(labels=(Label("revolver", 0.83),))
    assert (sure.level, sure.topics[0].id) == ("medium", ARMS)
    assert sure.evidence == ("Arms & Ammunition: label 'revolver' 0.83",)
    assert sure.topics[0].score == pytest.approx(0.83)
    doubtful = judged(labels=(Label("revolver", 0.4),))
    assert (doubtful.level, doubtful.topics) == (None, ())
    assert doubtful.doubts == ("maybe Arms & Ammunition: label 'revolver' 0.40",)
    assert judged(labels=(Label("revolver", 0.1),)).level == "low"


@pytest.mark.parametrize("name", ["beer glass", "wine bottle", "red wine", "cocktail shaker", "whiskey jug"])
def test_glasses_and_bottles_of_alcohol_are_alcohol(name):
    assert judged(labels=(Label(name, 0.9),)).topics[0].id == ALCOHOL


def test_a_tank_is_one_as_a_class_and_not_as_a_word():
    assert judged(labels=(Label("tank", 0.9),)).level == "medium"
    assert of_title("black tank top, fish tank").level == "low"


def test_ocr_speaks_when_it_is_sure():
    def found(text, score):
        return judged(texts=(FoundText(text, score, PAGE),))

    assert found("Absolut VODKA", 0.97).evidence[0].endswith("OCR 'vodka' 0.97")
    assert found("Absolut VODKA", 0.97).level == "medium"
    assert found("VODKA", 0.5).level is None
    assert found("GIN", 0.99).level is None  # so short a word comes out of many textures


def test_a_generated_caption_is_a_doubt_and_a_source_caption_is_not():
    assert judged(caption="a man smoking a cigarette").level is None
    assert judged(caption="a man smoking a cigarette").topics == ()
    assert judged(source_captions=("A man smokes a cigarette .",)).level == "medium"


def test_a_caption_made_of_a_class_says_nothing_new():
    caption = "a photo of a tobacco shop"
    assert judged(labels=(Label("tobacco shop", 0.9),), caption=caption, caption_source="labels").level == "low"
    assert judged(caption=caption, caption_source="generated").level is None


def test_what_confirms_a_sure_topic_is_no_doubt():
    actual = judged(source_captions=("a glass of beer",), caption="a man with a beer")
    assert actual.level == "medium"
    assert [doubt.split(":")[0] for doubt in actual.doubts] == ["sensitive"]


def test_the_worst_level_counts_and_the_surest_topic_comes_first():
    actual = judged(labels=(Label("wine bottle", 0.7),), metadata={"title": "murder"})
    assert actual.level == "high"
    assert [topic.score for topic in actual.topics] == pytest.approx([1.0, 0.7])


@pytest.mark.parametrize(
    "title",
    [
        "Men's bomber jacket", "a set of six shot glasses", "Shooting star necklace", "cordless nail gun", "toy gun", "a child with a toy soldier",
        "hot glue guns", "root beer", "non-alcoholic beer", "alcohol-free wine", "Women Cocktail Dress", "white wine vinegar", "nude heels",
        "Women Wine Red Top", "cigarette trousers", "Dead Sea mud mask", "bullet journal", "smoking jacket", "no smoking sign", "tug-of-war", "tug-o-war", "a water pistol", "flare gun", "topless men on a beach",
        "killer heels", "unisex t-shirt", "Essex", "grape juice", "rapeseed oil", "ginger ale", "heroine", "begin", "class", "Scunthorpe",
        "bath bombs", "army green parka", "pistolet à eau", "Aston Martin", "military-style coat", "Suicide Squad poster", "blood orange",
    ],
)  # fmt: skip
def test_harmless_things_that_sound_sensitive(title):
    assert of_title(title).level == "low", of_title(title).doubts


@pytest.mark.parametrize(
    ("title", "topic", "level"),
    [
        ("hunting rifles", ARMS, "medium"), ("A man with a GUN", ARMS, "medium"), ("nail gun and handgun", ARMS, "medium"),
        ("e-cigarettes", ALCOHOL, "medium"), ("Weißwein, trocken", ALCOHOL, "medium"), ("Bière blonde", ALCOHOL, "medium"),
        ("botella de vino", ALCOHOL, "medium"), ("naked people", ADULT, "high"), ("two corpses", "I4GWl6", "high"),
        ("car bombs", "8FD8nI", "floor"), ("human trafficking", "XtODT3", "floor"), ("swastikas", "HxqYV1", "high"),
        ("holy shit", "j9PaO9", "medium"), ("keygens", "mm3UXx", "high"), ("get rich quick", "6i4dB6", "high"), ("protesters", "Z7rJBM", "medium"),
    ],
)  # fmt: skip
def test_sensitive_words_in_their_forms_and_languages(title, topic, level):
    actual = of_title(title)
    assert (actual.topics[0].id, actual.level) == (topic, level)


def test_only_metadata_that_tell_what_is_shown_are_read():
    assert judged(metadata={"colour": "Wine", "author": "Jack Gun", "license": "beer licence"}).level == "low"
    assert judged(metadata={"keywords": ["summer", "wine"]}).level == "medium"
    assert judged(metadata={"title": 7, "keywords": None, "tags": [None, 3]}).level == "low"


def test_topics_are_iabs_eleven():
    path = DATA / "iab" / "content-taxonomy-3.1.tsv"
    if not path.exists():
        pytest.skip(f"needs the published taxonomy at {path} (set BEAMSIGHT_DATA)")
    with path.open(encoding="utf-8") as file:
        published = {row[0]: row[2] for row in csv.reader(file, delimiter="\t") if len(row) > 2 and row[1] == "v9i3On"}
    assert {topic.id: topic.name for topic in suitability_rules().topics} == published


def test_rules_name_known_levels_and_have_an_id():
    rules = suitability_rules()
    levels = {term.level for terms in rules.terms.values() for term in terms if term.topic}
    assert levels | {level for topic in rules.topics for level in topic.labels.values()} <= {*LEVELS, "doubt", "none"}
    assert len(rules.rules_id) == 12


TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(["beer", "no", "toy", "gun", "nude", "heels", "'s", "-", "porn", "VODKA"]), max_size=6
    ).map(" ".join),
)


@given(
    TEXTS,
    TEXTS,
    st.none() | st.floats(0, 1),
    st.none() | st.lists(st.tuples(TEXTS, st.floats(0, 1)), max_size=3),
    st.lists(st.tuples(st.sampled_from(["tank", "beer glass", "tabby"]), st.floats(0, 1)), max_size=3),
)
def test_whatever_is_known_a_level_is_explained(title, caption, nsfw_score, found, labels):
    actual = judged(
        metadata={"title": title},
        caption=caption,
        nsfw_score=nsfw_score,
        texts=None if found is None else tuple(FoundText(text, score, PAGE) for text, score in found),
        labels=tuple(Label(name, score) for name, score in labels),
    )
    assert actual.level in (*LEVELS, None)
    assert actual.level is None or actual.evidence
    assert actual.level is not None or actual.doubts
    assert (actual.level == "low") == (not actual.doubts and not actual.topics)
    assert all(0 <= topic.score <= 1 and topic.evidence for topic in actual.topics)


def test_what_looks_like_a_topic_is_a_doubt_and_nothing_more():
    arms = next(topic for topic in suitability_rules().topics if topic.id == ARMS)
    looks = TopicEmbeddings(np.array([[1, 0]], np.float32), ("a man holding a gun",), (arms,), 0.3)
    embeddings = np.array([[0.29, 0.96], [0.37, 0.93], [0, 0]], np.float32)
    near, like, none = judge([HARMLESS] * 3, embeddings, looks)
    assert (near.level, none.level) == ("low", "low")
    assert (like.level, like.topics) == (None, ())
    assert like.doubts == ("maybe Arms & Ammunition: looks like 'a man holding a gun' 0.37",)
    assert [each.level for each in judge([HARMLESS] * 3, embeddings, None)] == ["low"] * 3
    assert judge([], np.empty((0, 2), np.float32), looks) == []


def test_prompts_are_encoded_for_encoders_that_were_measured():
    looks = topic_embeddings("compact")
    assert looks is not None
    assert looks.embeddings.shape[0] == len(looks.prompts) == len(looks.topics)
    assert np.linalg.norm(looks.embeddings, axis=1) == pytest.approx(1, abs=1e-3)
    assert topic_embeddings("hf:openai/clip-vit-base-patch32") is None


def _with_people_s_captions(path):
    """Images of which only what people wrote is known, and everything else was looked for."""
    with tarfile.open(path) as shard:
        texts = [json.load(shard.extractfile(member)) for member in shard if member.name.endswith(".json")]
    return [
        dataclasses.replace(HARMLESS, source_captions=tuple(each.get("captions", ())), metadata=each) for each in texts
    ]


def test_few_photos_of_daily_life_are_called_sensitive(dev_shard):
    """25 of these 1,000 are, each of them by its looks as well."""
    actual = judge(_with_people_s_captions(dev_shard))
    assert 15 <= sum(bool(each.topics) for each in actual) <= 30
    assert sum(bool(each.doubts) for each in actual) <= 40


def test_the_titles_of_a_shop_are_not_sensitive():
    path = DATA / "fashion" / "products-00003.tar"
    if not path.exists():
        pytest.skip(f"needs the product photos at {path} (set BEAMSIGHT_DATA)")
    actual = judge(_with_people_s_captions(path))
    assert sum(bool(each.doubts) for each in actual) <= 0.005 * len(actual)


def test_the_images_of_a_batch_do_not_touch_one_another():
    evidences = [dataclasses.replace(HARMLESS, metadata={"title": title}) for title in ("a gun", "a cat", "vodka")]
    assert judge(evidences) == [judge([each])[0] for each in evidences]
    assert judge([]) == []
