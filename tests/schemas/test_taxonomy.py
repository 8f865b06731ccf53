"""Taxonomies: what is valid, what is told of what is not, and the two published formats."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.taxonomy import Entry, Taxonomy, parse_google, parse_iab, taxonomy_of

IAB = (
    "Relational ID System\t\t\tContent Taxonomy v3.1 Tiered Categories\t\t\t\tExtension\r\n"
    "Unique ID\tParent\tName\tTier 1\tTier 2\tTier 3\tTier 4\t\r\n"
    "210\t\tFood & Drink\tFood & Drink\t\t\t\t\r\n"
    "80DV8O\t210\tCooking\tFood & Drink\tCooking\t\t\t\r\n"
    "1\t80DV8O\tSoups\tFood & Drink\tCooking\tSoups\t\tSCD\r\n"
    "\r\n"
)
GOOGLE = "# Google_Product_Taxonomy_Version: 2021-09-21\n1 - Animals\n3237 - Animals > Live Animals\n2 - Animals > Pet - Food\n"


def read_iab(text: str) -> Taxonomy:
    return parse_iab(text, "t.tsv", "t")


def test_iab() -> None:
    taxonomy = read_iab(IAB)
    assert (taxonomy.name, taxonomy.version) == ("IAB Content Taxonomy", "3.1")
    assert [node.path for node in taxonomy.nodes][-1] == ("Food & Drink", "Cooking", "Soups")
    assert taxonomy.by_id["80DV8O"].parent == "210" and taxonomy.by_id["210"].parent is None
    assert "CC BY 3.0" in taxonomy.attribution


def test_google() -> None:
    taxonomy = parse_google(GOOGLE, "t.txt")
    assert (taxonomy.name, taxonomy.version) == ("Google Product Taxonomy", "2021-09-21")
    assert [(node.id, node.parent, node.name) for node in taxonomy.nodes] == [
        ("1", None, "Animals"), ("3237", "1", "Live Animals"), ("2", "1", "Pet - Food"),
    ]  # fmt: skip


def test_the_hash_is_that_of_ids_names_and_parents() -> None:
    lines = IAB.splitlines()
    moved = read_iab("\n".join([*lines[:2], lines[4], lines[2], lines[3]]))
    assert moved.hash == read_iab(IAB).hash and re.fullmatch(r"[0-9a-f]{12}", moved.hash)
    for old, new in (("Soups", "Soup"), ("1\t80DV8O", "1\t210"), ("80DV8O", "80DV80")):
        assert read_iab(IAB.replace(old, new)).hash != moved.hash


def test_find() -> None:
    taxonomy = read_iab(IAB)
    assert taxonomy.find("80DV8O").name == taxonomy.find("Food & Drink > Cooking").name == "Cooking"
    with pytest.raises(ValueError, match="'Cooking' is no category of IAB Content Taxonomy 3.1; give an id or a path"):
        taxonomy.find("Cooking")


def test_all_errors_are_told_at_once_with_their_lines() -> None:
    text = (
        "Unique ID\tParent\tName\n"
        "1\t\tA\n"
        "2\t9\tOrphan\n"
        "1\t\tAgain\n"
        "4\t\ta\n"
        "5\t1\tB\n"
        "6\t1\tB\n"
        "7\t8\tSeven\n"
        "8\t7\tEight\n"
        "no tabs\n"
        "\t1\tNo id\n"
    )
    with pytest.raises(ValueError) as caught:
        read_iab(text)
    assert str(caught.value).splitlines() == [
        "t.tsv is no valid taxonomy, 7 errors:",
        "  line 3: parent '9' of 'Orphan' is no node of this file; add it, or correct the id",
        "  line 4: id '1' is that of line 2 too; give each node an id of its own",
        "  line 5: root 'a' is there already, in line 2; rename one, or put it under a parent",
        "  line 7: 'B' is under '1' already, in line 6; rename one of them",
        "  line 8: 'Seven' is its own ancestor (7 > 8 > 7); correct a parent",
        "  line 10: must be id, parent and name between tabs, got 'no tabs'",
        "  line 11: must be id, parent and name between tabs, got '\\t1\\tNo id'",
    ]


def test_errors_of_google_files() -> None:
    with pytest.raises(ValueError) as caught:
        parse_google("1 - A\n2 - B > C\nAnimals > Pets\n3 - A\n4 - A > \n", "t.txt")
    message = str(caught.value)
    assert "line 2: 'B > C' stands there without its parent; add 'B'" in message
    assert "line 3: must be `id - A > B > C`, got 'Animals > Pets'; take the file with ids" in message
    assert "line 4: root 'A' is there already, in line 1" in message and "line 5: must be" in message


def test_no_header_and_no_nodes() -> None:
    with pytest.raises(ValueError, match="line 1: no header 'Unique ID, Parent, Name' in the first three lines"):
        read_iab("a\tb\tc\n")
    with pytest.raises(ValueError, match="line 1: there is no node; add one"):
        read_iab("Unique ID\tParent\tName\n")


def test_a_thousand_errors_are_cut_short() -> None:
    with pytest.raises(ValueError, match="1000 errors:") as caught:
        parse_google("x\n" * 1000, "t.txt")
    assert str(caught.value).endswith("and 950 more")


NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters=">#\t"), min_size=1, max_size=12)


@st.composite
def trees(draw: st.DrawFn) -> list[Entry]:
    """Entries of a valid taxonomy: each under an earlier one, or a root; names differ within a parent."""
    entries: list[Entry] = []
    taken: set[tuple[str | None, str]] = set()
    for number in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from([None, *(entry.id for entry in entries)]))
        name = draw(NAMES)
        if (parent, name.casefold()) not in taken:
            taken.add((parent, name.casefold()))
            entries.append(Entry(number + 1, str(number), name, parent))
    return entries


def as_iab(entries: list[Entry]) -> str:
    return "\n".join(["Unique ID\tParent\tName", *(f"{e.id}\t{e.parent or ''}\t{e.name}" for e in entries)])


@settings(max_examples=60, deadline=None)
@given(trees(), st.randoms())
def test_a_tree_is_read_back_in_whatever_order_it_stands(entries: list[Entry], order: random.Random) -> None:
    made = taxonomy_of("t", "1", entries, "t")
    shuffled = list(entries)
    order.shuffle(shuffled)
    assert parse_iab(as_iab(shuffled), "t.tsv", "t").hash == made.hash
    google = "\n".join(f"{node.id} - {' > '.join(node.path)}" for node in made.nodes)
    assert parse_google(google, "t.txt").by_path.keys() == made.by_path.keys()


@settings(max_examples=60, deadline=None)
@given(trees(), st.data())
def test_damage_is_told_or_harmless(entries: list[Entry], data: st.DataObject) -> None:
    """Whatever characters are lost or changed: a valid tree, or an error that names a line."""
    text = as_iab(entries)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 5)))
    damaged = text[:start] + data.draw(st.text(max_size=3)) + text[end:]
    for parse in (lambda: parse_iab(damaged, "t", "t"), lambda: parse_google(damaged, "t")):
        try:
            taxonomy = parse()
        except ValueError as error:
            assert re.search(r"^  line \d+: ", str(error), re.MULTILINE)
        else:
            assert all(node.path[-1] == node.name for node in taxonomy.nodes)


@settings(max_examples=60, deadline=None)
@given(trees(), st.data())
def test_a_cycle_is_found_wherever_it_is(entries: list[Entry], data: st.DataObject) -> None:
    first = data.draw(st.sampled_from(entries))
    below = [e for e in entries if first.id in ancestors(e, entries)]
    parent = data.draw(st.sampled_from([first, *below])).id
    changed = [Entry(e.line, e.id, e.name, parent) if e is first else e for e in entries]
    with pytest.raises(ValueError, match=r"line \d+: .* is its own ancestor"):
        taxonomy_of("t", "1", changed, "t")


def ancestors(entry: Entry, entries: list[Entry]) -> set[str]:
    by_id = {e.id: e for e in entries}
    found = set()
    while entry.parent is not None:
        found.add(entry.parent)
        entry = by_id[entry.parent]
    return found
