"""`beamsight evaluate` on coloured pictures, where it is known what a good model finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import main
from pipelines.evaluations.matcher import draw_pairs
from tests import toys
from tests.conftest import encode, tar_bytes
from vlm_ops.caption_metrics import bleu, bleu_counts, cider_d

TOY = "python:tests.toys"
KINDS = {"red": "Tshirts", "green": "Flip Flops", "blue": ["no", "single", "value"]}
COLORS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path / "cache"))
    members = []
    for name, color in COLORS.items():
        beside = {"captions": [f"{name}", f"a {name} picture"], "label": name.title(), "odd": {"nested": 1}}
        beside["kind"] = KINDS[name]
        members += [(f"{name}.png", encode(Image.new("RGB", (20, 20), color), "PNG"))]
        members += [(f"{name}.json", json.dumps(beside).encode())]
    members += [("plain.png", encode(Image.new("RGB", (20, 20), (90, 90, 90)), "PNG")), ("bad.png", b"no image")]
    (tmp_path / "colors.tar").write_bytes(tar_bytes(members))
    return tmp_path / "colors.tar"


def captioned_shard(path: Path, images: list[tuple[tuple[int, int, int], dict]]) -> Path:
    members = []
    for number, (color, beside) in enumerate(images):
        members += [(f"{number}.png", encode(Image.new("RGB", (20, 20), color), "PNG"))]
        members += [(f"{number}.json", json.dumps(beside).encode())]
    path.write_bytes(tar_bytes(members))
    return path


def evaluate(task: str, shard: Path, *flags: str) -> int:
    return main(["evaluate", task, "--input", str(shard), "--model", TOY, *flags])


def test_retrieval(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("retrieval", shard, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 3, "captions": 6, "images without captions": 1}
    assert found["model"] == f"{TOY}@1" and found["inputs"] == [str(shard)]
    for direction in ("text->image", "image->text"):
        assert found["figures"][f"{direction} R@1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert found["figures"][f"{direction} median rank"]["value"] == 1


def test_zero_shot(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("zero-shot", shard, "--json", "--template", "something {}", "--template", "{}") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 3, "labels": 3}
    assert found["figures"] == {"top-1": {"value": 1.0, "low": 1.0, "high": 1.0}}


def test_wrong_labels_count_as_wrong(tmp_path: Path, capsys: pytest.CaptureFixture, shard: Path) -> None:
    images = [*COLORS.items(), ("red", COLORS["blue"])]
    wrong = captioned_shard(tmp_path / "wrong.tar", [(color, {"label": name}) for name, color in images])
    assert evaluate("zero-shot", wrong, "--json") == 0
    top = json.loads(capsys.readouterr().out)["figures"]["top-1"]
    assert top["value"] == 0.75 and top["low"] < 0.75 < top["high"]


def test_table_and_page(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("retrieval", shard, "--html", str(tmp_path / "page.html")) == 0
    table = capsys.readouterr().out
    assert "retrieval of" in table and "text->image R@10" in table and "95 % of resamples in [1.000, 1.000]" in table
    page = (tmp_path / "page.html").read_text()
    assert "rank 1: a blue picture" in page and page.count("data:image/jpeg") == 6  # three images, best and worst


def test_a_second_evaluation_computes_nothing(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate("zero-shot", shard) == 0
    monkeypatch.setattr("vlm_ops.enrich.decode_batch", lambda *_: pytest.fail("it decoded again"))
    assert evaluate("retrieval", shard) == 0


def test_captions_of_another_field_are_read_anew(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert (
        evaluate("retrieval", shard, "--json")
        == evaluate("retrieval", shard, "--json", "--caption_field", "label")
        == 0
    )
    first, second = (json.loads(line)["counts"]["captions"] for line in capsys.readouterr().out.splitlines())
    assert (first, second) == (6, 3)


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("retrieval", ("--caption_field", "nothing"), "has a caption; name their field with --caption_field"),
        ("zero-shot", ("--label_field", "odd"), "has metadata 'odd'; name it with --label_field"),
        ("zero-shot", ("--model", "nothing"), "unknown model 'nothing'"),
        (
            "captions",
            ("--caption_field", "nothing"),
            "name their field with --caption_field, or measure with --mention or --never",
        ),
        ("captions", ("--mention", "label,odd"), "has metadata 'odd'; name another with --mention"),
        ("captions", ("--mention", "label", "--synonyms", "/no/file"), "no file of synonyms '/no/file'"),
        ("captions", ("--model", "compact:conse"), "model 'compact:conse' cannot serve op 'caption'"),
        ("matcher", ("--caption_field", "nothing"), "has a caption; name their field with --caption_field"),
        (
            "matcher",
            ("--model", "compact:conse"),
            "model 'compact:conse' does not say whether a text describes an image; it produces: embedding, features, grid, labels",
        ),
    ],
)
def test_mistakes(task: str, flags: tuple[str, ...], message: str, shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(task, shard, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("zero-shot", ("--template", "a photo"), "argument --template: {} must stand for the label, got 'a photo'"),
        ("retrieval", ("--never", "man"), "--mention, --synonyms and --never are for captions, not for retrieval"),
        ("captions", ("--synonyms", "FILE"), "--synonyms needs --mention"),
        ("caption", (), "invalid choice: 'caption'"),
    ],
)
def test_wrong_flags(
    task: str, flags: tuple[str, ...], message: str, shard: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate(task, shard, *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# --- captions -----------------------------------------------------------------------------------------


def test_captions_are_compared_with_those_of_people(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("captions", shard, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 4, "reference captions": 6, "images without captions": 1}
    figures = found["figures"]
    captions = [f"a {name} picture" for name in COLORS]
    references = [[name, f"a {name} picture"] for name in COLORS]
    assert figures["BLEU-4"]["value"] == pytest.approx(bleu(bleu_counts(captions, references)))
    assert figures["CIDEr-D"]["value"] == pytest.approx(cider_d(captions, references).mean())
    assert figures["ROUGE-L"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert 1 / 3 < figures["caption score"]["value"] < 1
    assert figures["captions of labels"]["value"] == 0
    assert not any(name.startswith("names") for name in figures)


def test_intervals_are_of_resampled_images(tmp_path: Path, capsys: pytest.CaptureFixture, shard: Path) -> None:
    """Two of eight captions are wrong: each figure lies inside its interval."""
    told = ["red", "red", "red", "green", "green", "blue", "green", "blue"]
    shown = [*told[:6], "red", "red"]
    images = [(COLORS[a], {"caption": f"a {b} picture"}) for a, b in zip(shown, told, strict=True)]
    wrong = captioned_shard(tmp_path / "wrong.tar", images)
    assert evaluate("captions", wrong, "--json") == 0
    for name, figure in json.loads(capsys.readouterr().out)["figures"].items():
        if name in ("BLEU-4", "CIDEr-D", "ROUGE-L"):
            assert figure["low"] < figure["value"] < figure["high"], name


def test_captions_that_are_labels_are_counted(
    shard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = toys.Caption
    monkeypatch.setattr(
        toys, "Caption", lambda text, _, score: made(text, "labels" if "red" in text else "generated", score)
    )
    assert evaluate("captions", shard, "--json") == 0
    assert json.loads(capsys.readouterr().out)["figures"]["captions of labels"]["value"] == 0.5


def test_captions_are_compared_with_metadata(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing = ("--caption_field", "nothing", "--json")
    assert evaluate("captions", shard, *nothing, "--mention", "label, kind", "--never", "picture's,red,man") == 0
    (tmp_path / "synonyms.json").write_text('{"tshirts": ["no", "picture"], "unused": []}')
    synonyms = ("--synonyms", str(tmp_path / "synonyms.json"))
    assert evaluate("captions", shard, *nothing, "--mention", "label", "--mention", "kind", *synonyms) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["counts"] == {
        "images": 4, "reference captions": 0, "images without captions": 4, "images with label": 3, "images with kind": 2,
    }  # fmt: skip
    assert list(first["figures"]) == [
        "caption score", "captions of labels", "names label", "names kind", "names picture's ...",
    ]  # fmt: skip
    assert first["figures"]["names label"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert first["figures"]["names kind"]["value"] == 0 and second["figures"]["names kind"]["value"] == 0.5
    assert first["figures"]["names picture's ..."]["value"] == 0.5


def test_one_unwanted_word_is_enough_to_measure(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("captions", shard, "--caption_field", "nothing", "--never", "blue") == 0
    assert "names blue             0.250  95 % of resamples in [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be like"),
        ('{"Hat": "cap"}', "must be like"),
        ('{"Hat": [1]}', "must be like"),
    ],
)
def test_synonyms_must_be_lists_of_words(
    content: str, message: str, shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "synonyms.json").write_text(content)
    assert evaluate("captions", shard, "--mention", "kind", "--synonyms", str(tmp_path / "synonyms.json")) == 2
    error = capsys.readouterr().err
    assert f"the file of synonyms '{tmp_path}/synonyms.json' {message}" in error


def test_pages_of_captions(shard: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert evaluate("captions", shard, "--html", str(page)) == 0
    text = page.read_text()
    assert text.index("Best") < text.index("CIDEr-D 4.93: a red picture") < text.index("Worst")
    assert "a blue picture (reference: blue)" in text and text.count("data:image/jpeg") == 6
    flags = ("--caption_field", "nothing", "--mention", "kind", "--never", "blue")
    assert evaluate("captions", shard, *flags, "--html", str(page)) == 0
    text = page.read_text()
    assert "a green picture (kind: Flip Flops)" in text and text.count("data:image/jpeg") == 8
    assert text.index("a blue picture", text.index("Worst")) < text.index("a green picture", text.index("Worst"))


# --- matcher ------------------------------------------------------------------------------------------


def test_matcher(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("matcher", shard, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 3, "right pairs": 6, "wrong pairs": 6, "images without captions": 1}
    assert found["figures"] == {name: {"value": 1.0, "low": 1.0, "high": 1.0} for name in ("AUC", "accuracy")}


def test_a_matcher_that_errs(tmp_path: Path, capsys: pytest.CaptureFixture, shard: Path) -> None:
    """One image is told to be blue, and is red."""
    images = [(COLORS[name], {"caption": f"a {name} picture"}) for name in ("red", "green", "blue", "green")]
    wrong = captioned_shard(tmp_path / "wrong.tar", [*images, (COLORS["red"], {"caption": "blue?"})])
    page = tmp_path / "page.html"
    assert evaluate("matcher", wrong, "--json", "--html", str(page)) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert all(each["low"] < each["value"] < 1 for each in figures.values())
    text = page.read_text()
    assert (
        text.index("Wrong pairs that it believes")
        < text.index("Right pairs that it doubts")
        < text.rindex("0.000: blue?")
    )


def test_the_pairs_of_a_matcher() -> None:
    captions = [["a"], ["a", "b"], ["c"], ["a"]]
    owners, others, texts = draw_pairs(captions)
    assert texts == ["a", "a", "b", "c", "a"] and owners.tolist() == [0, 1, 1, 2, 3]
    assert all(text not in captions[image] for image, text in zip(others, texts, strict=True))
    owners, others, texts = draw_pairs([["same"], ["same", "own"]])
    assert (owners.tolist(), others.tolist(), texts) == ([1], [0], ["own"])


def test_images_with_the_same_captions_make_no_wrong_pairs(
    tmp_path: Path, shard: Path, capsys: pytest.CaptureFixture
) -> None:
    same = captioned_shard(tmp_path / "same.tar", [(color, {"caption": "same"}) for color in COLORS.values()])
    assert evaluate("matcher", same) == 2
    assert "have different captions, so there are no wrong pairs; give more" in capsys.readouterr().err
