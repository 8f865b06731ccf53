"""Whether planning, shuffle and commit stay linear in time and bounded in memory over the number of shards.

    python benchmarks/bench_scale.py [--sizes 10000 100000] [--files 10000 100000] [--steps plan graph ...] [--sleep_ms 0]

A night of `build` and the next one, with everything real but the models: so many (empty) tars are listed and planned, their
references go through the pipeline on the local runner, and instead of computing a shard, a worker sleeps, links a part that
a real shard has become to the shard's name, and gives the summary that the shard would. What is gathered is published,
without an index. `--files` does the same with single files, in packs of a thousand, whose parts are written.

    plan      list the inputs, plan, write the work list
    graph     the pipeline's description: with the references in it, and with a work list
    run       the pipeline, up to the gathered summaries
    publish   gate, parts of the new state, commit, manifest
    night     the next night, with nothing new: list, read the state, plan
    known     hashes of all images, for that night's workers
    more      publish one shard in a hundred more

Each step runs in a process of its own; its peak of resident memory is told above what the process held once its modules were
loaded. Beside them, once:

    check     the sleeping worker beside the real one: 100 shards of four photos, and an op that sleeps
    reads     parts read a second where storage takes 20 ms to answer
    index     FAISS alone: bytes a vector and seconds, by factory string
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import apache_beam as beam
import faiss
import fsspec
import numpy as np
import pyarrow as pa
from apache_beam.coders import registry
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from PIL import Image

from pipelines.jobs import run_to_end
from pipelines.transforms import EnrichShards, ListedWork, PublishRun
from schemas.catalog import CatalogLayout
from schemas.recipes import Recipe
from schemas.samples import ShardRef, digest, image_id
from vlm_ops.contents import sha256_of, write_known_contents
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.inputs import InputConfig, Listing, list_inputs
from vlm_ops.models.settings import CPU
from vlm_ops.ops import ImageBatch, plan_ops, schema_of
from vlm_ops.parts import PartSummary, read_summary, writing_part
from vlm_ops.planning import Plan, PlanConfig, plan_inputs, rows_leaving
from vlm_ops.preprocessing import THUMBNAIL
from vlm_ops.publishing import PublishConfig, publish_run
from vlm_ops.shards import ReadConfig
from vlm_ops.states import CatalogState, Gone, current_state
from vlm_ops.work_lists import WorkList, read_stretch, write_work_list

ROOT = Path(__file__).parents[1]
NIGHT = ("plan", "graph", "run", "publish", "night", "known", "more")
ONCE = ("check", "reads", "index")
IMAGES_PER_SHARD = 4
FILES_PER_PACK = 1000
NAMES_PER_FILE = 50_000  # a file system allows one file only so many
LATENCY_SEC = 0.02
NUM_VECTORS, DIMENSIONS = 100_000, 384
# Of the last two, bytes alone are of interest: so a few vectors are enough to train on.
FACTORIES = ("IDMap2,Flat", f"IVF{4 * isqrt(NUM_VECTORS)},Flat", "IVF64,SQ8", "IVF64,PQ96x8")
READ = ReadConfig(10**8)
LOCAL = ["--runner=FnApiRunner", "--direct_running_mode=multi_threading"]

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000], help="numbers of shards")
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000], help="numbers of single files")
    parser.add_argument("--steps", nargs="+", choices=(*NIGHT, *ONCE), default=[*NIGHT, *ONCE])
    parser.add_argument("--sleep_ms", type=float, default=0.0, help="how long a worker sleeps over a shard")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        return print(json.dumps(measured(args.step, Night(args.scratch, args.threads, args.sleep_ms / 1000))))
    for kind, sizes in (("shards", args.sizes), ("files", args.files)):
        before: Figures = {}
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
                make_inputs(Path(scratch), kind, size)
                for step in (step for step in NIGHT if step in args.steps):
                    before |= told(f"{size:>9,} {kind:6}", step, args, scratch, size, before)
    for step in (step for step in ONCE if step in args.steps):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            told(" " * 16, step, args, scratch, 1, {})


def told(title: str, step: str, args: argparse.Namespace, scratch: str, size: int, before: Figures) -> Figures:
    """Runs a step in a process of its own and prints what came out, and how much of it an input takes, beside the size
    before; gives that."""
    command = [sys.executable, __file__, "--step", step, "--scratch", scratch]
    command += ["--threads", str(args.threads), "--sleep_ms", str(args.sleep_ms)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    an_input = {f"{step} {name}": value / size for name, value in figures.items()}
    texts = [f"{name} {value:,.4g}" for name, value in figures.items()]
    for i, name in enumerate(figures):
        if old := before.get(f"{step} {name}"):
            texts[i] += f" (×{an_input[f'{step} {name}'] / old:.2f} an input)"
    print(f"{title} {step:8} {'; '.join(texts)}", flush=True)
    return an_input


def measured(step: str, night: Night) -> Figures:
    gc.collect()
    before = memory_mb("VmRSS")
    figures = STEPS[step](night)
    return {**figures, "peak MB": memory_mb("VmHWM") - before}


def memory_mb(kind: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024


@contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    """Seconds by the clock, and of processor time, which other work on the machine does not change."""
    started, started_cpu = time.perf_counter(), time.process_time()
    yield
    figures[f"{name} s"] = time.perf_counter() - started
    figures[f"{name} CPU s"] = time.process_time() - started_cpu


# --- a catalog without models ---------------------------------------------------------------------


class SleepOp:
    """Sleeps over each image, as long as the environment says."""

    name = "bench_scale:SleepOp"
    capability = None
    columns = (pa.field("slept", pa.bool_(), metadata={"producer": "slept", "unit": "", "doc": "Whether it slept."}),)
    preprocessing = THUMBNAIL

    def __init__(self, model: object = None) -> None: ...

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        time.sleep(float(os.environ.get("BENCH_SCALE_SLEEP_SEC", 0)) * len(batch))
        return {"slept": pa.array([True] * len(batch))}


@dataclass(frozen=True)
class Night:
    """A catalog, its inputs and its runs."""

    folder: Path
    threads: int
    sleep_sec: float

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(plan_ops(["bench_scale:SleepOp"], "compact"), 10**8, 10**8)

    @property
    def catalog(self) -> CatalogLayout:
        return CatalogLayout(str(self.folder / "catalog"))

    @property
    def enrich(self) -> EnrichConfig:
        return EnrichConfig(self.catalog.root, self.recipe, "first", READ, CPU, num_threads=self.threads)

    def publish(self, run_id: str, sequence: int) -> PublishConfig:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return PublishConfig(self.catalog.root, self.recipe, run_id, "build", now, ("inputs",), Gone(), sequence, 0.5)

    def listing(self) -> Listing:
        return list_inputs(InputConfig((str(self.folder / "inputs"),), files_per_shard=FILES_PER_PACK))

    def plan(self, state: CatalogState, listing: Listing) -> Plan:
        return plan_inputs(PlanConfig(self.catalog, self.recipe, READ, FILES_PER_PACK), state, listing)

    def keep(self, name: str, value: object) -> None:
        (self.folder / name).write_bytes(pickle.dumps(value))

    def kept(self, name: str) -> Any:
        return pickle.loads((self.folder / name).read_bytes())

    def shards(self) -> list[ShardRef]:
        work: WorkList = self.kept("work")
        return [ShardRef.from_json(line) for stretch in work.stretches for line in read_stretch(work.uri, stretch, {})]

    def pipeline(self) -> beam.Pipeline:
        return beam.Pipeline(options=PipelineOptions([*LOCAL, f"--direct_num_workers={self.threads}"]))


@dataclass(frozen=True)
class Sleeper:
    """In place of an Enricher: gives parts and summaries, and computes nothing."""

    night: Night

    def enrich(
        self, shard: ShardRef, advance: Callable[[int, int], None] = lambda images, num_bytes: None
    ) -> PartSummary:
        catalog, name = self.night.catalog, shard.part_name(self.night.recipe.recipe_id)
        assert read_summary(catalog, name, {}) is None
        time.sleep(self.night.sleep_sec)
        if shard.format == "files":
            self._write(shard)
            summary = read_summary(catalog, name, {})
            assert summary is not None
            return summary
        number = int(Path(shard.uri).stem.rpartition("-")[2])
        os.link(self.night.folder / f"part{number // NAMES_PER_FILE}", f"{catalog.images}/{name}")
        return replace(self.night.kept("summary"), name=name, source_num_bytes=shard.num_bytes)

    def _write(self, shard: ShardRef) -> None:
        night = self.night
        uris = pa.array([file.uri for file in shard.files])
        columns = {"image_id": pa.array([image_id(file.uri) for file in shard.files]), "uri": uris}
        columns |= {"shard_uri": uris, "key": uris, "format": uris}
        columns["content_sha256"] = pa.array([sha256_of(file.uri.encode()) for file in shard.files])
        columns["source_version"] = pa.array([file.version for file in shard.files])
        recipe_id = night.recipe.recipe_id
        with writing_part(night.catalog, shard, schema_of(night.recipe.ops), recipe_id, "first", {}, {}) as part:
            part.write(columns, len(uris))


@dataclass(frozen=True)
class Sleepers:
    """In place of what shares a loaded Enricher."""

    night: Night

    def acquire(self, make: Callable[[], Any]) -> Sleeper:
        return Sleeper(self.night)


def make_inputs(folder: Path, kind: str, size: int) -> None:
    """Inputs without content, and the part and the summary that a shard of four photos becomes."""
    night = Night(folder, 1, 0.0)
    (folder / "inputs").mkdir()
    for number in range(size):
        if kind == "shards":
            (folder / "inputs" / f"shard-{number:07}.tar").touch()
            continue
        if number % FILES_PER_PACK == 0:
            (folder / "inputs" / f"{number // FILES_PER_PACK:05}").mkdir()
        (folder / "inputs" / f"{number // FILES_PER_PACK:05}" / f"photo-{number:07}.jpg").touch()
    (shard,) = make_shards(folder, 1)
    summary = Enricher(night.enrich).enrich(shard)
    for number in range(size // NAMES_PER_FILE + 2):
        shutil.copy(f"{night.catalog.images}/{summary.name}", folder / f"part{number}")
    os.unlink(f"{night.catalog.images}/{summary.name}")
    night.keep("summary", summary)


def make_shards(folder: Path, count: int) -> list[ShardRef]:
    """Tars of photos, each with other bytes."""
    shards = []
    for number in range(count):
        path = folder / f"real-{number:05}.tar"
        with tarfile.open(path, "w") as archive:
            for i in range(IMAGES_PER_SHARD):
                buffer = io.BytesIO()
                noise = np.random.default_rng((number, i)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(noise).save(buffer, "JPEG")
                info = tarfile.TarInfo(f"{i}.jpg")
                info.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(info, buffer)
        shards.append(ShardRef(str(path), "tar", "1", path.stat().st_size))
    return shards


# --- the steps ------------------------------------------------------------------------------------


def step_plan(night: Night) -> Figures:
    figures: Figures = {}
    with timed(figures, "list"):
        listing = night.listing()
    with timed(figures, "plan"):
        plan = night.plan(CatalogState(), listing)
    with timed(figures, "write"):
        work = write_work_list(str(night.folder / "work.jsonl.gz"), plan.shards, {})
    night.keep("work", work)
    return {**figures, "work list MB": work.stretches[-1][1] / 1e6}


def step_graph(night: Night) -> Figures:
    figures: Figures = {}
    shards = [as_on_object_storage(shard) for shard in night.shards()]
    work = write_work_list(str(night.folder / "work-remote.jsonl.gz"), shards, {})
    for name, first in (("references", beam.Create(shards)), ("work list", ListedWork(work, ShardRef.from_json, {}))):
        with timed(figures, f"{name} in it"):
            pipeline = night.pipeline()
            _ = pipeline | first | EnrichShards(night.enrich, Shared()) | PublishRun(night.publish("first", 0))
            size = len(pipeline.to_runner_api().SerializeToString())
        figures[f"{name} in it kB"] = size / 1e3
    figures["shuffled MB"] = sum(encoded(shard.to_json()) for shard in shards) / 1e6
    return figures


def as_on_object_storage(shard: ShardRef) -> ShardRef:
    """With a version of its own, which no compression makes smaller."""
    files = tuple(replace(file, version=2 * digest(file.uri)) for file in shard.files)
    return replace(shard, version="" if files else 2 * digest(shard.uri), files=files)


def encoded(element: str | PartSummary) -> int:
    """Bytes of an element in a shuffle, by the coder that Beam has for it; 12 more for key, time and window."""
    return len(registry.get_coder(type(element)).encode(element)) + 12


def step_run(night: Night) -> Figures:
    figures: Figures = {}
    os.makedirs(night.catalog.images, exist_ok=True)
    pipeline = night.pipeline()
    shards = pipeline | ListedWork(night.kept("work"), ShardRef.from_json, {})
    parts = shards | EnrichShards(night.enrich, Sleepers(night))  # type: ignore[arg-type]
    _ = parts | beam.combiners.ToList() | beam.Map(lambda summaries: night.keep("summaries", summaries))
    with timed(figures, "run"):
        run_to_end(pipeline)
    return {**figures, "gathered MB": sum(encoded(each) for each in night.kept("summaries")) / 1e6}


def step_publish(night: Night) -> Figures:
    return published(night, night.kept("summaries"), "first")


def step_more(night: Night) -> Figures:
    """One shard in a hundred more than there are."""
    num_shards = len(night.kept("summaries"))
    uris = [str(night.folder / f"more-{number:07}.tar") for number in range(max(num_shards // 100, 1))]
    sleeper = Sleeper(replace(night, sleep_sec=0.0))
    return published(night, [sleeper.enrich(ShardRef(uri, "tar", "1", 0)) for uri in uris], "second")


def published(night: Night, summaries: Sequence[PartSummary], run_id: str) -> Figures:
    figures: Figures = {}
    sequence = current_state(night.catalog, {}).sequence
    with timed(figures, "publish"):
        manifest = publish_run(night.publish(run_id, sequence), summaries)
    assert manifest.status == "committed" and manifest.num_added == sum(each.num_images for each in summaries)
    newest = max(Path(night.catalog.images, "_delta_log").glob("*.json"))
    return {**figures, "log entry MB": newest.stat().st_size / 1e6}


def step_night(night: Night) -> Figures:
    figures: Figures = {}
    with timed(figures, "list"):
        listing = night.listing()
    with timed(figures, "state"):
        state = current_state(night.catalog, {})
    with timed(figures, "plan"):
        plan = night.plan(state, listing)
    assert not plan.shards and not plan.gone and plan.kept.shards + plan.kept.files
    return figures


def step_known(night: Night) -> Figures:
    figures: Figures = {}
    state = current_state(night.catalog, {})
    path = night.folder / "known.arrow"
    with timed(figures, "write"):
        write_known_contents(str(path), night.catalog.images, state.images, {}, rows_leaving(Plan(), False))
    return {**figures, "file MB": path.stat().st_size / 1e6}


def step_check(night: Night) -> Figures:
    """Each in a catalog of its own."""
    figures: Figures = {}
    num_shards, sleep_sec = 100, 0.02
    os.environ["BENCH_SCALE_SLEEP_SEC"] = str(sleep_sec / IMAGES_PER_SHARD)
    make_inputs(night.folder, "shards", 0)
    shards = make_shards(night.folder, num_shards)
    for name in ("real", "sleeping"):
        own = replace(night, folder=night.folder / name, sleep_sec=sleep_sec)
        os.makedirs(own.catalog.images)
        for each in ("summary", "part0", "part1"):
            shutil.copy(night.folder / each, own.folder / each)
        pipeline = own.pipeline()
        shared: Any = Shared() if name == "real" else Sleepers(own)
        work = write_work_list(str(own.folder / "work"), shards, {})
        parts = pipeline | ListedWork(work, ShardRef.from_json, {}) | EnrichShards(own.enrich, shared)
        _ = parts | beam.combiners.ToList() | beam.Map(lambda summaries, own=own: own.keep("summaries", summaries))
        with timed(figures, f"{name} run"):
            run_to_end(pipeline)
        summaries = own.kept("summaries")
        figures[f"{name} summary bytes"] = sum(encoded(each) for each in summaries) / num_shards
        figures[f"{name} part bytes"] = sum(each.num_bytes for each in summaries) / num_shards
        with timed(figures, f"{name} publish"):
            manifest = publish_run(own.publish("first", 0), summaries)
        assert manifest.num_images == num_shards * IMAGES_PER_SHARD
    figures["of it slept s"] = num_shards * sleep_sec / night.threads
    return figures


class SlowFile(AbstractBufferedFile):
    """A local file of which each range takes a request."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        time.sleep(LATENCY_SEC)
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class SlowFileSystem(AbstractFileSystem):
    """Local files, as slow to answer as an object store."""

    protocol = "slow"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        time.sleep(LATENCY_SEC)
        path = self._strip_protocol(path)
        return {"name": path, "size": os.path.getsize(path), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> SlowFile:
        return SlowFile(self, path, mode, cache_type="readahead")


def step_reads(night: Night) -> Figures:
    figures: Figures = {}
    num_parts = 200
    fsspec.register_implementation("slow", SlowFileSystem)
    make_inputs(night.folder, "shards", 0)
    for number in range(num_parts):
        os.link(night.folder / "part0", night.folder / f"copy{number}")
    parts = [LivePart(f"copy{number}", IMAGES_PER_SHARD, 0) for number in range(num_parts)]
    uri, columns = f"slow://{night.folder}", ["image_id", "content_sha256"]
    with timed(figures, "one by one"):
        for part in parts:
            list(read_columns(uri, [part], columns, {}))
    with timed(figures, "ahead"):
        assert len(list(read_columns(uri, parts, columns, {}))) == num_parts
    return {f"{name} parts/s": num_parts / figures[f"{name} s"] for name in ("one by one", "ahead")}


def step_index(night: Night) -> Figures:
    figures: Figures = {}
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, DIMENSIONS)).astype(np.float32)
    vectors = centres[rng.integers(0, len(centres), NUM_VECTORS)]
    vectors += rng.normal(size=vectors.shape).astype(np.float32)
    faiss.normalize_L2(vectors)
    faiss.omp_set_num_threads(night.threads)
    for factory in FACTORIES:
        index = faiss.index_factory(DIMENSIONS, factory, faiss.METRIC_INNER_PRODUCT)
        is_small = "IVF64" in factory
        with timed(figures, f"{factory} train"):
            index.train(vectors[: 1_000 if is_small else 64 * 4 * isqrt(NUM_VECTORS)])
        with timed(figures, f"{factory} add"):
            index.add_with_ids(vectors, np.arange(NUM_VECTORS))
        figures[f"{factory} bytes a vector"] = len(faiss.serialize_index(index)) / NUM_VECTORS
    return figures


STEPS: dict[str, Callable[[Night], Figures]] = {name: globals()[f"step_{name}"] for name in (*NIGHT, *ONCE)}

if __name__ == "__main__":
    main()
