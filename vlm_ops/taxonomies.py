"""A taxonomy's name or file -> the taxonomy; and which of its categories a label means. Formats: docs/taxonomies.md."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import yaml

from schemas.recipes import DEFAULT_TAXONOMY
from schemas.taxonomy import Entry, FileError, Taxonomy, invalid, parse_google, parse_iab, taxonomy_of
from vlm_ops import storage

_BUILT_IN = (DEFAULT_TAXONOMY,)
_MAPPING = "mapping of labels"
_TOP_KEYS = frozenset({"name", "version", "attribution", "nodes"})
_NODE_KEYS = frozenset({"id", "name", "parent", "prompts", "sensitive", "visible"})


def load_taxonomy(spec: str, storage_options: storage.StorageOptions | None = None) -> Taxonomy:
    """A built-in taxonomy by its name, or that of a file: our YAML, IAB's tab-separated table, Google's text.

    Raises:
        FileNotFoundError: There is neither a built-in taxonomy nor a file of this name.
        ValueError: The file is no valid taxonomy; the message has a line for each error.
    """
    if spec in _BUILT_IN:
        text = files("schemas").joinpath("taxonomies", f"{spec}.yaml").read_text(encoding="utf-8")
        return parse_yaml(text, f"the built-in taxonomy {spec!r}")
    try:
        content = storage.read_bytes(storage.normalise(spec), storage_options or {})
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"no taxonomy {spec!r}; name a file, or a built-in one: {', '.join(_BUILT_IN)}"
        ) from error
    return parse(_decoded(content, spec, "taxonomy"), spec)


def parse(text: str, where: str) -> Taxonomy:
    """A taxonomy in any of the three formats; which one, its name and its first lines tell.

    Raises:
        ValueError: It is none, with a line for each error.
    """
    name = PurePath(where)
    lines = [line for line in text.splitlines() if line.strip()]
    if name.suffix.lower() in (".yaml", ".yml"):
        return parse_yaml(text, where)
    if name.suffix.lower() == ".tsv" or any(line.startswith("Unique ID\t") for line in lines[:3]):
        return parse_iab(text, where, name.stem)
    if name.suffix.lower() == ".txt" or (lines and lines[0].startswith("# Google_Product_Taxonomy")):
        return parse_google(text, where)
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Taxonomy:
    """A taxonomy in our own format.

    Raises:
        ValueError: It is none, with a line for each error.
    """
    top = _composed(text, where, "taxonomy")
    errors: list[FileError] = []
    values = _mapping(top, _TOP_KEYS, "the file", errors)
    name, version, attribution = (_text(values, key, errors) for key in ("name", "version", "attribution"))
    if not name and "name" not in values:
        errors.append(FileError(1, "has no `name`; add one"))
    listed = values.get("nodes")
    if not isinstance(listed, yaml.SequenceNode):
        errors.append(FileError(_line(listed) if listed else 1, "`nodes` must be a list of nodes"))
        raise invalid(where, errors)
    entries = [entry for item in listed.value for entry in _entry(item, errors)]
    return taxonomy_of(name or "", version or "", entries, where, attribution or "", errors)


def load_mapping(
    uri: str, taxonomy: Taxonomy, storage_options: storage.StorageOptions | None = None
) -> dict[str, tuple[str, ...]]:
    """Which categories a label means: a YAML file of lines `label: category`, a category being an id or a path such as
    "Food & Drink > Cooking", or a list of such.

    Returns:
        Ids by label.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It says something else, or names a category that is not there; with a line for each error.
    """
    try:
        content = storage.read_bytes(storage.normalise(uri), storage_options or {})
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no mapping file {uri!r}; it maps labels to categories") from error
    return parse_mapping(_decoded(content, uri, _MAPPING), taxonomy, uri)


def parse_mapping(text: str, taxonomy: Taxonomy, where: str) -> dict[str, tuple[str, ...]]:
    """The mapping in a text, as `load_mapping` returns it.

    Raises:
        ValueError: See there.
    """
    errors: list[FileError] = []
    top = _composed(text, where, _MAPPING)
    found: dict[str, tuple[str, ...]] = {}
    if not isinstance(top, yaml.MappingNode):
        raise invalid(where, [FileError(1, "must be lines of `label: category`")], _MAPPING)
    for key, value in top.value:
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        label = key.value if isinstance(key, yaml.ScalarNode) else ""
        if not label or not items or not all(isinstance(each, yaml.ScalarNode) for each in items):
            errors.append(FileError(_line(key), "must be `label: category`, or `label: [category, category]`"))
        elif label in found:
            errors.append(FileError(_line(key), f"label {label!r} stands there twice; leave one out"))
        else:
            found[label] = tuple(id_ for each in items for id_ in _found(taxonomy, each, errors))
    if not found and not errors:
        errors.append(FileError(1, "has no `label: category`; add one"))
    if errors:
        raise invalid(where, errors, _MAPPING)
    return found


def _found(taxonomy: Taxonomy, item: yaml.Node, errors: list[FileError]) -> Iterator[str]:
    try:
        yield taxonomy.find(item.value).id
    except ValueError as error:
        errors.append(FileError(_line(item), str(error)))


def _decoded(content: bytes, where: str, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise invalid(where, [FileError(line, "is not UTF-8; save the file as UTF-8")], what) from error


def _composed(text: str, where: str, what: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = FileError(mark.line + 1 if mark else 1, f"is not YAML: {error.problem or error.context}")
    except yaml.YAMLError as error:
        found = FileError(1, f"is not YAML: {str(error).splitlines()[0]}")
    raise invalid(where, [found], what)


def _entry(item: yaml.Node, errors: list[FileError]) -> Iterator[Entry]:
    """The entry of a node, or none where something is wrong with it."""
    num_errors = len(errors)
    values = _mapping(item, _NODE_KEYS, "a node", errors)
    id_, name, parent = (_text(values, key, errors) for key in ("id", "name", "parent"))
    if len(errors) == num_errors and not (id_ and name):
        errors.append(FileError(_line(item), "a node must have an `id` and a `name`, neither of them empty"))
    prompts = _prompts(values.get("prompts"), errors)
    sensitive, visible = _flag(values, "sensitive", False, errors), _flag(values, "visible", True, errors)
    if id_ and name:
        yield Entry(_line(item), id_, name, parent or None, prompts, sensitive, visible)


def _mapping(item: yaml.Node | None, known: frozenset[str], what: str, errors: list[FileError]) -> dict[str, yaml.Node]:
    if not isinstance(item, yaml.MappingNode):
        keys = ", ".join(sorted(known))
        errors.append(FileError(_line(item) if item else 1, f"{what} must be lines of `key: value`, of {keys}"))
        return {}
    values: dict[str, yaml.Node] = {}
    for key, value in item.value:
        if key.value not in known:
            message = f"{what} has no {str(key.value)[:80]!r}; it has {', '.join(sorted(known))}"
            errors.append(FileError(_line(key), message))
        elif key.value in values:
            errors.append(FileError(_line(key), f"{key.value!r} stands there twice; leave one out"))
        else:
            values[key.value] = value
    return values


def _text(values: dict[str, yaml.Node], key: str, errors: list[FileError]) -> str | None:
    """A single value as it is written: an id 007 is no number."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, yaml.ScalarNode):
        errors.append(FileError(_line(value), f"{key!r} must be a single value"))
        return None
    return None if value.tag == "tag:yaml.org,2002:null" else " ".join(value.value.split())


def _prompts(value: yaml.Node | None, errors: list[FileError]) -> tuple[str, ...]:
    if value is None:
        return ()
    items = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if any(not isinstance(each, yaml.ScalarNode) or not each.value.strip() for each in items):
        errors.append(FileError(_line(value), "`prompts` must be a list of texts"))
        return ()
    return tuple(" ".join(each.value.split()) for each in items)


def _flag(values: dict[str, yaml.Node], key: str, default: bool, errors: list[FileError]) -> bool:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, yaml.ScalarNode) or value.value.lower() not in ("true", "false"):
        errors.append(FileError(_line(value), f"{key!r} must be true or false"))
        return default
    return value.value.lower() == "true"


def _line(item: Any) -> int:
    return item.start_mark.line + 1
