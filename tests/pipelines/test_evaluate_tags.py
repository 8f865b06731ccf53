"""`beamsight evaluate tags`: by hand-made findings, and on a catalog of coloured pictures that `tag` has tagged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli import main
from pipelines.evaluations.tags import Judged, calibration_error, figures_of
from tests.pipelines.test_evaluate import COLORS, TOY, captioned_shard

TAXONOMY = """\
name: Colours
version: "1"
nodes:
- {id: w, name: Warm}
- {id: r, name: Red things, parent: w, prompts: [a red picture, a red wall]}
- {id: g, name: Green things, prompts: [a green picture]}
- {id: b, name: Blue things, prompts: [a blue picture]}
"""
MAPPING = "Red: Warm > Red things\nGreen: g\nBlue: [b]\nPink: w\n"


def judged(truths: list[tuple[str, ...]], *found: tuple[tuple[str, ...], float]) -> Judged:
    return Judged({"image_id": id(found)}, tuple(truths), found)


def values(*images: Judged) -> dict[str, float]:
    return {name: round(figure.value, 3) for name, figure in figures_of(images).items()}


def test_figures_by_hand() -> None:
    right = judged([("A", "B")], (("A",), 0.9), (("C",), 0.8), (("A", "B"), 0.7), (("A", "B", "X"), 0.6))
    shallow = judged([("A", "B")], (("A",), 0.9))
    wrong = judged([("C",)], (("A",), 0.4), (("A", "B"), 0.35))
    nothing = judged([("C",)])
    either = judged([("C",), ("A", "B")], (("A",), 0.9), (("A", "B"), 0.8))
    assert values(right, shallow, wrong, nothing, either) == {
        "coverage": 0.8,
        "lands under the category": 0.4,
        "accuracy of tier 1": 0.6,
        "accuracy of tier 2": 0.5,
        "precision of the first": 0.75,
        "precision of all": round(5 / 8, 3),
        "calibration error": round((0.3 + 0.1 * 3 + 0.6 + 0.4 + 0.35) / 8, 3),
        "right of those scored 0.3 to 0.4": 0.0,
        "right of those scored 0.4 to 0.5": 0.0,
        "right of those scored 0.7 to 0.8": 1.0,
        "right of those scored 0.8 to 0.9": 0.5,
        "right of those scored 0.9 to 1.0": 1.0,
    }


def test_what_is_below_a_true_category_is_not_known() -> None:
    below = judged([("A",)], (("A", "B"), 0.5))
    assert values(below) == {
        "coverage": 1.0, "lands under the category": 1.0, "accuracy of tier 1": 1.0, "precision of the first": 1.0,
    }  # fmt: skip


def test_nothing_was_assigned() -> None:
    assert values(judged([("A",)]))["coverage"] == 0


def test_calibration_error() -> None:
    assert calibration_error(np.array([[0.75, 1], [0.75, 1], [0.75, 1], [0.75, 0]], float)) == 0
    assert calibration_error(np.array([[1.0, 0], [0.0, 1]], float)) == 1


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Path:
    """A folder with a tagged catalog of six pictures, `taxonomy.yaml` and `mapping.yaml`."""
    folder = tmp_path_factory.mktemp("tagged")
    (folder / "taxonomy.yaml").write_text(TAXONOMY)
    (folder / "mapping.yaml").write_text(MAPPING)
    labelled = [("red", "Red"), ("red", "Pink"), ("green", "Green"), ("blue", "Green"), ("blue", "Odd")]
    images = [(COLORS[color], {"label": label}) for color, label in labelled]
    shard = captioned_shard(folder / "colors.tar", [*images, (COLORS["green"], {})])
    assert main(["build", "--input", str(shard), "--catalog", str(folder / "c"), "--model", TOY]) == 0
    flags = ["--taxonomy", str(folder / "taxonomy.yaml"), "--min_score", "0.3"]
    assert main(["tag", str(folder / "c"), *flags]) == 0
    return folder


def evaluate(folder: Path, *flags: str, catalog: str = "c", mapping: str = "mapping.yaml") -> int:
    given = ["--catalog", str(folder / catalog), "--mapping", str(folder / mapping)]
    return main(["evaluate", "tags", *given, "--taxonomy", str(folder / "taxonomy.yaml"), *flags])


def test_a_tagged_catalog(tagged: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(tagged, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 4, "images without a label that is mapped": 2, "images without tags": 0}
    assert found["figures"]["coverage"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["figures"]["lands under the category"]["value"] == 0.75
    assert found["figures"]["accuracy of tier 1"]["value"] == 0.75
    assert found["figures"]["accuracy of tier 2"]["value"] == 1.0
    assert found["model"].startswith("Colours 1, tag recipe ") and found["inputs"] == [str(tagged / "c")]


def test_table_and_page(tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(tagged, "--html", str(tmp_path / "page.html")) == 0
    table = capsys.readouterr().out
    assert "tags of" in table and re.search(r"lands under the category +0\.750  95 % of resamples in", table)
    page = (tmp_path / "page.html").read_text()
    assert page.index("Wrong, surest first") < page.index("(label: Green things)") < page.index("Right, surest first")
    assert page.count("data:image/jpeg") == 4


def test_another_taxonomy_field_mapping_or_catalog(tagged: Path, capsys: pytest.CaptureFixture) -> None:
    (tagged / "tea.yaml").write_text("Tea: g\n")
    (tagged / "iab.yaml").write_text("Red: Pets\n")
    wrong = [
        (lambda: evaluate(tagged, "--taxonomy", "iab-content-3.1", mapping="iab.yaml"), "was tagged with Colours 1 ("),
        (lambda: evaluate(tagged, "--label_field", "kind"), "has metadata 'kind' that"),
        (lambda: evaluate(tagged, mapping="tea.yaml"), "(there are: Green, None, Odd, Pink, Red)"),
        (lambda: evaluate(tagged, mapping="none.yaml"), "no mapping file"),
        (lambda: evaluate(tagged, catalog="none"), "no catalog"),
    ]
    for call, message in wrong:
        assert call() == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tags", "--catalog", "c"], "tags needs --catalog, a tagged catalog, and --mapping"),
        (
            ["tags", "--catalog", "c", "--mapping", "m", "--input", "x"],
            "tags are read from --catalog; leave out --input",
        ),
        (["retrieval", "--input", "x", "--catalog", "c"], "--catalog and --mapping are for tags, not for retrieval"),
        (["retrieval"], "the following arguments are required: --input"),
    ],
)
def test_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", *argv])
    assert message in capsys.readouterr().err
