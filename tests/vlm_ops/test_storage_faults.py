"""Storage that fails for a moment is asked again; what is forbidden, missing or wrong is not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from schemas.samples import Sample, ShardRef
from tests.servers import (
    CUT_READ,
    CUT_WRITE,
    HANG,
    LOST_ANSWER,
    RESET,
    Fault,
    Proxy,
    Rule,
    Store,
    gcs_store,
    moto_store,
)
from vlm_ops import storage
from vlm_ops.delta_tables import CommitConflictError, LivePart, live_parts, open_table, set_live
from vlm_ops.shards import ReadConfig, read_shard

DATA = os.urandom(300_000)
# Half a second without a byte is long for a server on the same machine.
IMPATIENT = {"s3": {"config_kwargs": {"read_timeout": 0.5}}, "gs": {"requests_timeout": 0.5}}


@pytest.fixture(scope="module", params=["moto", pytest.param("gcs", marks=pytest.mark.gcs)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("server")
    with moto_store("faulty") if request.param == "moto" else gcs_store("faulty", folder) as store:
        storage.write_bytes(f"{store.uri}/in/data.bin", DATA, store.options)
        table, options = f"{store.uri}/table", storage.delta_options(store.uri, store.options)
        write_deltalake(table, pa.table({"a": [1, 2]}), storage_options=options)
        yield store


@pytest.fixture(scope="module")
def proxy(server: Store) -> Iterator[Proxy]:
    with Proxy(server.address) as proxy:
        yield proxy


@pytest.fixture
def store(server: Store, proxy: Proxy) -> Iterator[Store]:
    """The server behind the proxy."""
    proxy.fail()
    behind = server.at(proxy.url)
    yield replace(behind, options={**behind.options, **IMPATIENT[storage.scheme_of(server.uri)]})
    proxy.fail()


def read_whole(store: Store) -> object:
    return storage.read_bytes(f"{store.uri}/in/data.bin", store.options) == DATA


def read_range(store: Store) -> object:
    fs = storage.filesystem(store.uri, store.options)
    return fs.cat_file(f"{store.uri}/in/data.bin", start=7, end=200_000) == DATA[7:200_000]


def read_stream(store: Store) -> object:
    with storage.open_for_reading(f"{store.uri}/in/data.bin", store.options) as file:
        return b"".join(iter(lambda: file.read(70_000), b"")) == DATA


def look(store: Store) -> object:
    fs = storage.filesystem(store.uri, store.options)
    info = fs.info(f"{store.uri}/in/data.bin")
    return storage.exists(f"{store.uri}/in/data.bin", store.options) and info["size"] == len(DATA)


def list_files(store: Store) -> object:
    fs = storage.filesystem(store.uri, store.options)
    return [storage.uri_of(fs, name) for name in fs.find(f"{store.uri}/in")] == [f"{store.uri}/in/data.bin"]


def write(store: Store) -> object:
    storage.write_bytes(f"{store.uri}/out/a", DATA, store.options)
    return storage.read_bytes(f"{store.uri}/out/a", store.options) == DATA


def write_first(store: Store) -> object:
    uri = f"{store.uri}/out/{os.urandom(8).hex()}"
    with storage.replacing(uri, store.options, only_if_absent=True) as path, open(path, "wb") as file:
        file.write(DATA)
    return storage.read_bytes(uri, store.options) == DATA


def delete(store: Store) -> object:
    storage.write_bytes(f"{store.uri}/out/b", b"x", store.options)
    storage.remove(f"{store.uri}/out/b", store.options)
    return not storage.exists(f"{store.uri}/out/b", store.options)


def read_table(store: Store) -> object:
    table = open_table(f"{store.uri}/table", store.options)
    return table is not None and table.version() == 0


slow = pytest.mark.slow
READS = [read_stream, list_files, read_table, *(pytest.param(f, marks=slow) for f in (read_whole, read_range, look))]
WRITES = [write_first, *(pytest.param(f, marks=slow) for f in (write, delete))]


@pytest.mark.parametrize("fault", [500, 503, 429, RESET, CUT_READ, HANG])
@pytest.mark.parametrize("what", READS)
def test_reading_goes_on(store: Store, proxy: Proxy, what: Callable[[Store], object], fault: Fault) -> None:
    assert fault is not None
    proxy.fail(Rule(fault, times=2))
    assert what(store)
    assert proxy.num_failed() == 2


@pytest.mark.parametrize("fault", [500, 503, 429, RESET, CUT_WRITE, LOST_ANSWER, HANG])
@pytest.mark.parametrize("what", WRITES)
def test_writing_goes_on(store: Store, proxy: Proxy, what: Callable[[Store], object], fault: Fault) -> None:
    assert fault is not None
    proxy.fail(Rule(fault, times=2, methods="PUT POST DELETE"))
    assert what(store)
    assert proxy.num_failed() == 2


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("what", [read_whole, write, read_table])
def test_what_stays_wrong_is_not_asked_again(
    store: Store, proxy: Proxy, what: Callable[[Store], object], status: int
) -> None:
    proxy.fail(Rule(status))
    started = time.monotonic()
    with pytest.raises((OSError, ValueError)) as raised:
        assert what(store)
    assert time.monotonic() - started < 5 and len(proxy.seen()) <= 4
    if what is not read_whole:
        assert f"{store.uri}/" in str(raised.value) and "\n" not in str(raised.value)


def test_a_catalog_is_looked_for_before_any_work(store: Store, proxy: Proxy) -> None:
    storage.check_writable(store.uri, store.options)
    storage.check_writable(f"{store.uri}/new/catalog", store.options)
    scheme = storage.scheme_of(store.uri)
    with pytest.raises(
        ValueError, match=rf"'{scheme}://not-there/c' cannot be made: there is no bucket {scheme}://not-there;"
    ):
        storage.check_writable(f"{scheme}://not-there/c", store.options)
    proxy.fail(Rule(403))
    with pytest.raises(ValueError, match=rf"'{store.uri}/c' cannot be reached: Forbidden.*; check .*credentials"):
        storage.check_writable(f"{store.uri}/c", store.options)
    with pytest.raises(ValueError, match=rf"'{store.uri}/table' cannot be reached: 403 Forbidden; check .*credentials"):
        open_table(f"{store.uri}/table", store.options)


def test_patience_ends(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less of it than by default."""
    monkeypatch.setattr(storage, "_ATTEMPTS", 3)
    monkeypatch.setitem(storage._DELTA_PATIENCE, "retry_timeout", "1s")
    monkeypatch.setattr(storage, "persistent", lambda function: function)
    proxy.fail(Rule(503))
    uri = f"{store.uri}/out/c"
    with pytest.raises(OSError, match=f"cannot write {uri}: "):
        storage.write_bytes(uri, b"x", store.options)
    with pytest.raises(OSError, match=f"cannot reach {uri}: "):
        storage.check_writable(uri, store.options)
    with pytest.raises(OSError, match=f"cannot reach {store.uri}/table: 503 Service Unavailable"):
        open_table(f"{store.uri}/table", store.options)


def test_no_half_upload_is_seen(store: Store, proxy: Proxy) -> None:
    """Readers find the old content until the new one is whole, however often its upload was cut."""
    uri = f"{store.uri}/out/d"
    storage.write_bytes(uri, b"old", store.options)
    proxy.fail(Rule(CUT_WRITE, times=3, methods="PUT POST"))
    seen = []
    with storage.replacing(uri, store.options) as path:
        with open(path, "wb") as file:
            file.write(DATA)
        seen.append(storage.read_bytes(uri, store.options))
    seen.append(storage.read_bytes(uri, store.options))
    assert seen == [b"old", DATA] and proxy.num_failed() == 3


def test_a_commit_whose_answer_is_lost_is_made_once(store: Store, proxy: Proxy) -> None:
    uri = f"{store.uri}/{os.urandom(4).hex()}"
    options = storage.delta_options(uri, store.options)
    write_deltalake(uri, pa.table({"a": [1]}), storage_options=options)
    proxy.fail(Rule(LOST_ANSWER, times=1, methods="PUT", path="00001.json"))
    write_deltalake(uri, pa.table({"a": [2]}), mode="append", storage_options=options)
    assert proxy.num_failed() == 1
    table = DeltaTable(uri, storage_options=options)
    assert sorted(table.to_pyarrow_table().column("a").to_pylist()) == [1, 2]


def test_a_run_whose_answer_is_lost_has_committed(store: Store, proxy: Proxy) -> None:
    """Asked again, storage says that the log entry is there: it is that of the run itself."""
    uri, schema = f"{store.uri}/{os.urandom(4).hex()}", pa.schema([("a", pa.int64())])
    parts = [LivePart("one.parquet", 1, 100)]
    assert set_live(uri, schema, [], "r0", store.options, {"note": "empty"}) == 1
    proxy.fail(Rule(LOST_ANSWER, times=1, methods="PUT", path="00002.json"))
    assert set_live(uri, schema, parts, "r1", store.options, {"note": "one"}, expected=1) == 2
    assert proxy.num_failed() == 1
    table = open_table(uri, store.options)
    assert table is not None and table.version() == 2 and live_parts(table) == parts
    with pytest.raises(CommitConflictError, match=f"another run changed {uri}"):
        set_live(uri, schema, [], "r2", store.options, {"note": "late"}, expected=1)


def test_storage_that_fails_is_no_damaged_shard(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is wrong with the data becomes a failure; all else is raised, so that a run can go on later."""
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [os.urandom(100_000), os.urandom(100_000)]}), sink, row_group_size=1)
    uri = f"{store.uri}/in/shard.parquet"
    storage.write_bytes(uri, sink.getvalue().to_pybytes(), store.options)
    shard, config = ShardRef(uri, "parquet", "", 0), ReadConfig(10**6, storage_options=store.options)
    assert len([item for item in read_shard(shard, config) if isinstance(item, Sample)]) == 2
    for fault in (403, HANG):
        if fault == 403 and storage.scheme_of(uri) == "gs":
            continue  # gcsfs raises what Arrow raises for damage
        proxy.fail(Rule(fault, methods="GET", after=1))
        with pytest.raises(Exception) as raised:
            list(read_shard(shard, config))
        assert isinstance(raised.value, PermissionError) if fault == 403 else storage.may_pass(raised.value)
