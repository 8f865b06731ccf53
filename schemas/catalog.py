"""The layout of a catalog on storage: every path and file name in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART_NAME = re.compile(
    r"part-(?P<location>[ps][0-9a-f]{16})-(?P<content>[0-9a-f]{12})-(?P<recipe>[0-9a-f]{12})(-(?P<revision>[0-9a-f]{8}))?\.parquet"
)


@dataclass(frozen=True)
class CatalogLayout:
    """Paths of one catalog, as URIs below `root`."""

    root: str

    @property
    def images(self) -> str:
        return f"{self.root}/images"

    @property
    def tags(self) -> str:
        return f"{self.root}/tags"

    @property
    def failures(self) -> str:
        return f"{self.root}/failures"

    @property
    def indexes(self) -> str:
        return f"{self.root}/indexes"

    @property
    def runs(self) -> str:
        return f"{self.root}/runs"

    def index_file(self, run_id: str, name: str) -> str:
        """A file of the index that a run made; `name` is one of INDEX_MANIFEST, INDEX_FILE, INDEX_ROWS."""
        return f"{self.indexes}/{run_id}/{name}"

    def run_file(self, run_id: str, name: str) -> str:
        """`name` is one of RUN_MANIFEST, RUN_METRICS, RUN_REPORT, RUN_CONTENTS, RUN_WORK."""
        return f"{self.runs}/{run_id}/{name}"


INDEX_MANIFEST = "manifest.json"
INDEX_FILE = "embeddings.faiss"
INDEX_ROWS = "rows.parquet"
RUN_MANIFEST = "manifest.json"
RUN_METRICS = "metrics.json"
RUN_REPORT = "report.html"
RUN_CONTENTS = "contents.arrow"  # these two only while the run is at work
RUN_WORK = "work.jsonl.gz"


def part_name(shard_id: str, recipe_id: str, revision: str = "") -> str:
    """File name of a part. `revision`, 8 hex digits, tells parts of the same shard and version apart."""
    return f"part-{shard_id}-{recipe_id}{'-' if revision else ''}{revision}.parquet"


_INDEX_FILES = (INDEX_MANIFEST, INDEX_FILE, INDEX_ROWS)
_RUN_ID = re.compile(r"\d{8}T\d{9}-[0-9a-f]{6}")
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp")


def is_data_file(path: str) -> bool:
    """Whether a path below the root is a part, a file of an index, or what a killed run left: what may be deleted
    when no state needs it. Logs and reports are not, nor is what somebody else put there."""
    folder, _, rest = path.partition("/")
    run_id, _, name = rest.rpartition("/")
    unfinished = _UNFINISHED.fullmatch(name)
    name = unfinished["name"] if unfinished else name
    if folder in ("images", "failures", "tags"):
        return not run_id and parse_part_name(name) is not None
    if not _RUN_ID.fullmatch(run_id):
        return False
    if folder == "indexes":
        return name in _INDEX_FILES
    return folder == "runs" and (name in (RUN_CONTENTS, RUN_WORK) or unfinished is not None)


@dataclass(frozen=True)
class PartName:
    """What the name of a part tells."""

    location_id: str
    content_id: str
    recipe_id: str
    revision: str = ""

    @property
    def shard_id(self) -> str:
        return f"{self.location_id}-{self.content_id}"

    @property
    def is_packed(self) -> bool:
        """Whether the part comes from single files, which are replaced one by one."""
        return self.location_id.startswith("p")


def parse_part_name(name: str) -> PartName | None:
    """The reverse of `part_name`; None for a file that this project did not name."""
    match = _PART_NAME.fullmatch(name)
    return PartName(match["location"], match["content"], match["recipe"], match["revision"] or "") if match else None
