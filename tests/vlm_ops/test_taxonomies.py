"""Taxonomies by name or file, our own format, and the mapping of labels to categories."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes import make_iab
from schemas.taxonomy import Taxonomy
from tests.conftest import DATA
from vlm_ops.taxonomies import load_mapping, load_taxonomy, parse_mapping, parse_yaml

OURS = """\
name: Shop
version: "1"
attribution: ours
nodes:
- {id: 007, name: Clothes, prompts: [a shirt, "trousers"]}
- {id: b, name: Shoes, parent: 007, prompts: a pair of shoes}
- id: c
  name: Weapons
  sensitive: true
  visible: False
"""


def test_our_own_format() -> None:
    taxonomy = parse_yaml(OURS, "shop.yaml")
    assert (taxonomy.name, taxonomy.version, taxonomy.attribution) == ("Shop", "1", "ours")
    clothes, shoes, weapons = taxonomy.nodes
    assert clothes.id == "007" and clothes.prompts == ("a shirt", "trousers") and clothes.visible
    assert shoes.path == ("Clothes", "Shoes") and shoes.prompts == ("a pair of shoes",) and not shoes.sensitive
    assert weapons.sensitive and not weapons.visible


def test_prompts_do_not_change_what_a_category_is() -> None:
    assert parse_yaml(OURS.replace("a shirt", "a coat"), "t").hash == parse_yaml(OURS, "t").hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "line 1: the file must be lines of `key: value`, of attribution, name, nodes, version"),
        ("", "line 1: the file must be lines of"),
        ("nodes: [{id: 1, name: A}]", "line 1: has no `name`; add one"),
        ("name: t\nnodes: 5", "line 2: `nodes` must be a list of nodes"),
        ("name: t\nnode: []", "line 2: the file has no 'node'; it has attribution, name, nodes, version"),
        ("name: t\nname: u\nnodes: []", "line 2: 'name' stands there twice; leave one out"),
        ("name: t\nnodes:\n- {id: 1}", "line 3: a node must have an `id` and a `name`"),
        ("name: t\nnodes:\n- {id: 1, name: [a]}", "line 3: 'name' must be a single value"),
        ("name: t\nnodes:\n- {id: 1, name: a, prompt: b}", "line 3: a node has no 'prompt'; it has id, name, parent"),
        ("name: t\nnodes:\n- {id: 1, name: a, prompts: {}}", "line 3: `prompts` must be a list of texts"),
        ("name: t\nnodes:\n- {id: 1, name: a, sensitive: maybe}", "line 3: 'sensitive' must be true or false"),
        ("name: t\nnodes:\n- {id: 1, name: a}\n- {id: 1, name: b}", "line 4: id '1' is that of line 3 too"),
        ("name: t\nnodes: [", "is not YAML"),
        ("name: t\nnodes: \x07", "is not YAML"),
    ],
)
def test_errors_of_our_own_format(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text, "t.yaml")
    assert message in str(caught.value) and str(caught.value).startswith("t.yaml is no valid taxonomy")


def test_the_format_is_told_by_name_or_content(tmp_path: Path) -> None:
    iab, google = "Unique ID\tParent\tName\n1\t\tA\n", "# Google_Product_Taxonomy_Version: 1\n1 - A\n"
    for name, text in (("a.tsv", iab), ("a", iab), ("b.txt", google), ("b", google), ("c.yml", OURS), ("c", OURS)):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_taxonomy(str(tmp_path / name)).nodes
    (tmp_path / "latin.tsv").write_bytes(iab.encode() + b"2\t\t\xe4\n")
    with pytest.raises(ValueError, match="line 3: is not UTF-8; save the file as UTF-8"):
        load_taxonomy(str(tmp_path / "latin.tsv"))
    with pytest.raises(FileNotFoundError, match="no taxonomy 'iab'; name a file, or a built-in one: iab-content-3.1"):
        load_taxonomy("iab")


@pytest.fixture(scope="module")
def iab() -> Taxonomy:
    return load_taxonomy("iab-content-3.1")


def test_the_built_in_taxonomy(iab: Taxonomy) -> None:
    assert len(iab.nodes) == 704 and "CC BY 3.0" in iab.attribution and "IAB Technology Laboratory" in iab.attribution
    assert iab.find("Sensitive Topics > Terrorism").sensitive and iab.find("War and Conflicts").sensitive
    assert not iab.find("Law").visible and iab.find("Style & Fashion").visible


def test_the_script_makes_the_built_in_taxonomy() -> None:
    published = DATA / "iab" / "content-taxonomy-3.1.tsv"
    if not published.exists():
        pytest.skip(f"needs the published taxonomy at {published} (set BEAMSIGHT_DATA)")
    ours = yaml.safe_load(make_iab.PROMPTS.read_text(encoding="utf-8"))
    made = make_iab.make(published.read_text(encoding="utf-8"), ours)
    assert made.encode() == make_iab.OUTPUT.read_bytes()
    assert load_taxonomy(str(published)).hash == load_taxonomy("iab-content-3.1").hash


def test_prompts_of_no_node_are_refused() -> None:
    with pytest.raises(ValueError, match="2 in iab-prompts.yaml: no id of the published file; correct it"):
        make_iab.make("Unique ID\tParent\tName\n1\t\tA\n", {"prompts": {"2": ["b"]}, "sensitive": []})


def test_mappings_that_come_with_the_project(iab: Taxonomy) -> None:
    for path in sorted(make_iab.PROMPTS.parent.glob("*-categories.yaml")):
        if path.name != "flickr-categories.yaml":
            assert load_mapping(str(path), iab), path
        else:
            assert all(iab.find(id_) for id_ in yaml.safe_load(path.read_text(encoding="utf-8")))


def test_a_mapping(iab: Taxonomy, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("Tea: Food & Drink > Non-Alcoholic Beverages\n1: [Pets, '425']\n")
    assert load_mapping(str(tmp_path / "m.yaml"), iab) == {"Tea": ("222",), "1": ("422", "425")}
    with pytest.raises(FileNotFoundError, match="no mapping file '/no/file'; it maps labels to categories"):
        load_mapping("/no/file", iab)


def test_errors_of_a_mapping(iab: Taxonomy) -> None:
    with pytest.raises(ValueError) as caught:
        parse_mapping("Tea: Drinks\nTea: Pets\nDog: {a: b}\nTea: Pets\nCat: []\n", iab, "m.yaml")
    message = str(caught.value)
    assert message.startswith("m.yaml is no valid mapping of labels, 5 errors:")
    assert "line 1: 'Drinks' is no category of IAB Content Taxonomy 3.1; give an id or a path" in message
    assert "line 2: label 'Tea' stands there twice; leave one out" in message
    assert "line 3: must be `label: category`, or `label: [category, category]`" in message
    for text in ("", "- a\n", "{}"):
        with pytest.raises(ValueError, match="line 1: "):
            parse_mapping(text, iab, "m.yaml")
