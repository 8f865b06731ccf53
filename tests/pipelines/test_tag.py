"""`beamsight tag` night after night, on coloured pictures and a taxonomy of colours."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from PIL import Image, ImageDraw

import pipelines.tag
import vlm_ops.tag_publishing
from pipelines.cli import main
from schemas.tags import TAGS
from tests.conftest import encode, tar_bytes
from tests.vlm_ops.test_text_writer import save_model
from vlm_ops import text_rules

TOY = "python:tests.toys"
PALETTE = {"red": (230, 20, 30), "green": (20, 220, 40), "blue": (30, 20, 240), "lilac": (210, 120, 200)}
TAXONOMY = """
name: Colours
version: "1"
nodes:
  - {id: "1", name: Warm}
  - {id: "2", name: Red, parent: "1", prompts: [a red thing]}
  - {id: "3", name: Cold}
  - {id: "4", name: Green, parent: "3", prompts: [a green thing]}
  - {id: "5", name: Blue, parent: "3", prompts: [a blue thing]}
"""


def picture(color: str, seed: int = 0) -> bytes:
    """A picture of one colour with some lines, so that it is not plain."""
    image = Image.new("RGB", (64, 64), PALETTE[color])
    draw = ImageDraw.Draw(image)
    for i in range(1 + seed % 5):
        draw.line((4 * seed % 64, 9 * i, 60 - i, 63 - 11 * i), fill=(0, 0, 0), width=1 + seed % 3)
    return encode(image, "PNG")


class Catalog:
    """A catalog of coloured pictures, and the commands on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.folder = folder
        self.path = folder / "catalog"
        self.taxonomy = folder / "colours.yaml"
        self.taxonomy.write_text(TAXONOMY)
        self._capsys = capsys

    def tar(self, name: str, *colors: str, **beside: Any) -> None:
        members = []
        for i, color in enumerate(colors):
            members += [(f"{name}-{color}{i}.png", picture(color, i))]
            members += [(f"{name}-{color}{i}.json", json.dumps({"label": color, **beside}).encode())]
        (self.folder / f"{name}.tar").write_bytes(tar_bytes(members))

    def run(self, command: str, *arguments: str, code: int = 0) -> str:
        self._capsys.readouterr()
        assert main([command, *arguments]) == code
        captured = self._capsys.readouterr()
        return captured.out if code == 0 else captured.err

    def build(self, *flags: str) -> str:
        tars = sorted(str(path) for path in self.folder.glob("*.tar"))
        toy = ("--model", TOY, "--device", "cpu")
        return self.run("build", "--input", *tars, "--catalog", str(self.path), *toy, *flags)

    def tag(self, *flags: str, code: int = 0) -> str:
        usual = {"--taxonomy": str(self.taxonomy), "--min_score": "0.1"}  # toys are not sure of much
        named = [word for flag, value in usual.items() if flag not in flags for word in (flag, value)]
        return self.run("tag", str(self.path), *named, *flags, code=code)

    def rows(self) -> dict[str, dict[str, Any]]:
        table = DeltaTable(str(self.path / "tags")).to_pyarrow_table()
        assert table.schema.names == TAGS.names
        rows = {row["uri"].rpartition("#")[2]: row for row in table.to_pylist()}
        assert len(rows) == table.num_rows
        return rows


@pytest.fixture
def catalog(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path / "cache"))
    made = Catalog(tmp_path, capsys)
    made.tar("a", "red", "green", "blue")
    made.tar("b", "blue", "red")
    made.build()
    return made


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def test_every_image_has_a_row_that_says_what_it_was_made_with(catalog: Catalog) -> None:
    said = catalog.tag()
    assert "tagged     5 images, 0 as they were" in said
    rows = catalog.rows()
    images = DeltaTable(str(catalog.path / "images")).to_pyarrow_table()
    assert {row["image_id"] for row in rows.values()} == set(images["image_id"].to_pylist())
    for name, row in rows.items():
        color = re.findall("red|green|blue", name)[0]
        assert row["categories"][0]["path"][-1] in (color.title(), "Warm" if color == "red" else "Cold")
        assert {"labels", "image"} & set(row["categories"][0]["evidence"])
        assert not text_rules.alt_text_violations(row["alt_text"])
        assert (row["taxonomy_name"], row["taxonomy_version"]) == ("Colours", "1")
        assert re.fullmatch("[0-9a-f]{12}", row["taxonomy_hash"])
        assert {slot["slot"] for slot in row["ad_slots"]} >= {"google_ads_square", "merchant_center_product"}
        assert row["dominant_colors"][0]["name"]
        # What was not looked for is not taken for harmless.
        assert row["suitability"] is None
        assert row["review"] == "needs_review"
        assert any("--ops safety" in reason for reason in row["review_reasons"])
    assert len({row["slug"] for row in rows.values()}) == len(rows)
    assert len({row["run_id"] for row in rows.values()}) == 1


def test_a_child_is_never_likelier_than_its_parent(catalog: Catalog) -> None:
    catalog.tag("--min_score", "0", "--max_categories", "5")
    for row in catalog.rows().values():
        scores = {tuple(category["path"]): category["score"] for category in row["categories"]}
        assert len(scores) == 5
        for path, score in scores.items():
            assert len(path) == 1 or score <= scores[path[:-1]]


def test_at_most_so_many_categories_and_none_that_is_unlikely(catalog: Catalog) -> None:
    catalog.tag("--min_score", "0", "--max_categories", "2")
    assert {len(row["categories"]) for row in catalog.rows().values()} == {2}
    catalog.tag("--min_score", "1")
    assert {len(row["categories"]) for row in catalog.rows().values()} == {0}


def test_only_new_and_changed_rows_are_tagged(catalog: Catalog) -> None:
    catalog.tag()
    before = catalog.rows()
    assert "all 5 images of" in catalog.tag()
    catalog.tar("a", "red", "green", "lilac")  # the third picture is another one
    catalog.tar("c", "green")
    catalog.build()
    assert "would tag 2 images, 4 would stay as they are" in catalog.tag("--dry_run")
    assert catalog.rows() == before
    said = catalog.tag()
    assert "tagged     2 images, 4 as they were" in said
    after = catalog.rows()
    changed = {name for name, row in after.items() if row["run_id"] != before["a-red0.png"]["run_id"]}
    assert changed == {"a-lilac2.png", "c-green0.png"}


def test_what_left_the_catalog_leaves_the_tags(catalog: Catalog) -> None:
    catalog.tag()
    (catalog.folder / "b.tar").unlink()
    catalog.build("--prune")
    assert "is_current" in catalog.run("inspect", str(catalog.path), "--json")
    assert "the images have changed since" in catalog.run("inspect", str(catalog.path))
    catalog.tag()
    assert {name[0] for name in catalog.rows()} == {"a"}
    assert "the images have changed since" not in catalog.run("inspect", str(catalog.path))


def test_step_by_step_is_as_all_at_once(catalog: Catalog) -> None:
    catalog.tag()
    catalog.tar("b", "blue", "red", "green", "blue")
    catalog.build()
    catalog.tag()
    step_by_step = catalog.rows()
    catalog.tag("--all")
    at_once = catalog.rows()
    assert {name: without(row, "run_id") for name, row in at_once.items()} == {
        name: without(row, "run_id") for name, row in step_by_step.items()
    }
    assert {row["run_id"] for row in at_once.values()}.isdisjoint(row["run_id"] for row in step_by_step.values())


def test_another_taxonomy_means_tag_again_and_no_build(catalog: Catalog) -> None:
    catalog.tag()
    before = catalog.rows()
    catalog.taxonomy.write_text(TAXONOMY.replace("Blue", "Azure"))
    assert "tagged     5 images" in catalog.tag()
    after = catalog.rows()
    assert after["a-blue2.png"]["categories"][0]["path"] in (["Cold"], ["Cold", "Azure"])
    assert after["a-blue2.png"]["taxonomy_hash"] != before["a-blue2.png"]["taxonomy_hash"]


def test_a_killed_run_goes_on(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.transforms.publish_tags", killed)
        assert "the machine went down" in catalog.tag(code=1)
    assert "no tags" not in catalog.run("inspect", str(catalog.path), "--json")
    assert "tags       none" in catalog.run("inspect", str(catalog.path))
    catalog.tag()
    (metrics,) = [
        json.loads(path.read_text())
        for path in catalog.path.glob("runs/*/metrics.json")
        if "images_kept" in path.read_text()
    ]
    assert metrics["parts_reused"] == 2
    assert len(catalog.rows()) == 5


def test_of_two_runs_at_once_one_wins(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = vlm_ops.tag_publishing.publish_tags
    others = []

    def late(config: Any, summaries: Any) -> Any:
        if not others:
            others.append(1)
            catalog.tag("--all")
        return publish(config, summaries)

    monkeypatch.setattr("pipelines.transforms.publish_tags", late)
    assert "another run changed" in catalog.tag(code=1)
    assert len(catalog.rows()) == 5


def test_near_duplicates_with_other_tags_are_told(catalog: Catalog) -> None:
    # The same lines, so the same grey picture to a perceptual hash, in other colours.
    catalog.tar("c", "lilac", "red", "red", "red")
    catalog.tar("d", "lilac", "red", "red", "green")
    catalog.build()
    catalog.tag()
    rows = catalog.rows()
    told = {
        name: reason
        for name, row in rows.items()
        for reason in row["review_reasons"]
        if reason.startswith("near duplicate")
    }
    assert rows["c-red3.png"]["categories"] != rows["d-green3.png"]["categories"]
    assert told["c-red3.png"] == f"near duplicate of an image with other tags: {rows['d-green3.png']['image_id']}"
    assert told["d-green3.png"] == f"near duplicate of an image with other tags: {rows['c-red3.png']['image_id']}"
    (catalog.folder / "d.tar").unlink()
    catalog.build("--prune")
    catalog.tag()
    rows = catalog.rows()
    assert not any("near duplicate" in reason for reason in rows["c-red3.png"]["review_reasons"])


def test_search_takes_only_what_the_tags_allow(catalog: Catalog) -> None:
    assert "which `beamsight tag` makes" in catalog.run(
        "search", str(catalog.path), "red", "--where", "review = 'ok'", code=2
    )
    catalog.tag()

    def found(where: str, *flags: str) -> list[str]:
        answer = json.loads(
            catalog.run("search", str(catalog.path), "red", "--json", "-k", "2", "--where", where, *flags)
        )
        return [row["uri"].rpartition("#")[2] for row in answer["results"]]

    # Two results, although the best five hold but these two.
    assert set(found("uri like '%blue%'")) == {"a-blue2.png", "b-blue0.png"}
    assert found("uri like '%green%' and review = $review", "--param", "review=needs_review") == ["a-green1.png"]
    assert found("false") == []
    assert "--where 'nonsense'" in catalog.run("search", str(catalog.path), "red", "--where", "nonsense", code=2)


def test_inspect_counts(catalog: Catalog) -> None:
    catalog.tag()
    tags = json.loads(catalog.run("inspect", str(catalog.path), "--json"))["tags"]
    assert tags["images"] == 5
    assert tags["is_current"] is True
    assert tags["review"] == {"needs_review": 5}
    assert sum(tags["categories"].values()) + tags["without_category"] == 5
    assert "suitable   unknown 5 (100%)" in catalog.run("inspect", str(catalog.path))


def test_clean_takes_what_no_reader_needs(catalog: Catalog) -> None:
    catalog.tag()
    catalog.tag("--all")
    before = len(list((catalog.path / "tags").glob("*.parquet")))
    assert f"tags {before - 2}" in catalog.run("clean", str(catalog.path), "--older_than", "0m")
    assert len(list((catalog.path / "tags").glob("*.parquet"))) == 2
    assert len(catalog.rows()) == 5


def test_the_report_shows_images_with_their_tags(catalog: Catalog) -> None:
    said = catalog.tag()
    page = Path(re.search(r"report +(.*)", said)[1]).read_text()  # type: ignore[index]
    assert page.count("data:image/jpeg;base64") == 5
    assert "Some that a person should look at" in page
    assert "--ops safety" in page


def test_calibration_is_fitted_on_labelled_images(catalog: Catalog) -> None:
    catalog.tar("labelled", *(["red", "green", "blue"] * 10))
    mapping, calibration = catalog.folder / "mapping.yaml", catalog.folder / "calibration.json"
    mapping.write_text("red: Warm > Red\ngreen: Cold > Green\nblue: '5'\n")
    labelled = str(catalog.folder / "labelled.tar")
    catalog.tag("--calibrate", labelled, "--mapping", str(mapping), "--calibration", str(calibration))
    fitted = json.loads(calibration.read_text())
    assert fitted["num_images"] == 30
    rows = catalog.rows()
    catalog.tag("--all", "--calibration", str(calibration))
    again = catalog.rows()
    assert {name: without(row, "run_id") for name, row in rows.items()} == {
        name: without(row, "run_id") for name, row in again.items()
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--taxonomy", "no-such"], "no taxonomy 'no-such'; name a file, or a built-in one: iab-content-3.1"),
        (
            ["--calibration", "no-such.json"],
            "no calibration 'no-such.json'; --calibrate PATTERN --mapping FILE makes it",
        ),
        (["--text_model", "hf:/no/such/model"], "/no/such/model"),
    ],
)
def test_mistakes_are_told_before_any_work(catalog: Catalog, flags: list[str], message: str) -> None:
    assert message in catalog.tag(*flags, code=2)
    assert not (catalog.path / "tags").exists()


def test_no_catalog(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["tag", str(tmp_path / "nothing")]) == 2
    assert "no catalog at" in capsys.readouterr().err


def test_flags_that_need_one_another(capsys: pytest.CaptureFixture) -> None:
    for flags, message in (
        (["--calibrate", "x.tar"], "--calibrate needs --mapping"),
        (["--mapping", "x.yaml"], "--mapping is for --calibrate"),
        (["--calibrate", "x.tar", "--mapping", "m", "--calibration", "c", "--dry_run"], "--dry_run writes nothing"),
    ):
        with pytest.raises(SystemExit):
            main(["tag", "catalog", *flags])
        assert message in capsys.readouterr().err


def test_a_catalog_without_embeddings_has_tags_without_categories(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.build("--ops", "quality,caption")
    catalog.tag()
    assert "no embeddings (--ops embedding), so its images get no categories" in caplog.text
    rows = catalog.rows()
    assert not any(row["categories"] for row in rows.values())
    assert all(row["alt_text"] for row in rows.values())


def test_in_processes_the_same_comes_out(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.tag()
    here = catalog.rows()
    monkeypatch.setattr(pipelines.tag, "_MANY_IMAGES", 1)
    catalog.tag("--all", "--num_threads", "2")
    assert {name: without(row, "run_id") for name, row in catalog.rows().items()} == {
        name: without(row, "run_id") for name, row in here.items()
    }


def test_a_language_model_that_writes_nonsense_costs_nothing_but_time(catalog: Catalog, tmp_path: Path) -> None:
    catalog.tag()
    by_templates = catalog.rows()
    spec = save_model(tmp_path / "model")
    catalog.tag("--text_model", spec, "--device", "cpu")
    rows = catalog.rows()
    for name, row in rows.items():
        assert row["title"] == by_templates[name]["title"]
        assert "text_model" not in row["tag_source"].values()
        assert row["tag_recipe_id"] != by_templates[name]["tag_recipe_id"]
    assert "all 5 images of" in catalog.tag("--text_model", spec, "--device", "cpu")


def test_the_log_names_the_images_that_were_tagged(catalog: Catalog) -> None:
    catalog.tag()
    record = json.loads(DeltaTable(str(catalog.path / "tags")).history(1)[0]["beamsight"])
    images = DeltaTable(str(catalog.path / "images"))
    assert record["images_version"] == images.version()
    assert record["images_run_id"] == json.loads(images.history(1)[0]["beamsight"])["run_id"]
    assert (record["num_images"], record["num_tagged"]) == (5, 5)
    assert datetime.fromisoformat(record["committed_at"])
    assert pa.schema(TAGS).names == TAGS.names
