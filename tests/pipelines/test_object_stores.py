"""A catalog on object storage, through the real protocols of S3 and Google Cloud Storage.

`moto` is in the default suite; MinIO (`-m minio`) and a Google Cloud Storage server (`-m gcs`) are built once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from deltalake import DeltaTable

from pipelines.cli import main
from tests.conftest import jpeg, tar_bytes
from tests.servers import (
    CUT_READ,
    CUT_WRITE,
    HANG,
    LOST_ANSWER,
    RESET,
    Proxy,
    Rule,
    Store,
    gcs_store,
    minio_store,
    moto_store,
)
from vlm_ops import delta_tables, storage

TOY = "python:tests.toys"
STORES = ["moto", pytest.param("minio", marks=pytest.mark.minio), pytest.param("gcs", marks=pytest.mark.gcs)]


@pytest.fixture(scope="module", params=STORES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp(request.param)
    stores = {
        "moto": lambda: moto_store("corpus"),
        "minio": lambda: minio_store("corpus", folder),
        "gcs": lambda: gcs_store("corpus", folder),
    }
    with stores[request.param]() as store:
        yield store


@pytest.fixture
def store(server: Store, request: pytest.FixtureRequest) -> Store:
    """A folder of the server for one test."""
    return replace(server, uri=f"{server.uri}/{request.node.originalname}")


@pytest.fixture
def corpus(store: Store) -> list[str]:
    """Two shards of three photos, and a list of three of which one is missing."""
    put(store, "a.tar", shard(1, 2, 3))
    put(store, "b.tar", shard(4, 5, 6))
    put(store, "photos/7.jpg", jpeg(7))
    put(store, "photos/8.jpg", jpeg(8))
    put(store, "list.jsonl", "\n".join(json.dumps({"uri": f"photos/{i}.jpg"}) for i in (7, 8, 9)).encode())
    return [f"{store.uri}/{name}" for name in ("a.tar", "b.tar", "list.jsonl")]


def shard(*seeds: int) -> bytes:
    return tar_bytes([(f"{seed}.jpg", jpeg(seed)) for seed in seeds])


def put(store: Store, name: str, data: bytes) -> None:
    storage.write_bytes(f"{store.uri}/{name}", data, store.options)


def catalog(store: Store) -> str:
    return f"{store.uri}/catalog"


def command(store: Store, name: str, *arguments: str) -> int:
    """A command on the store's catalog."""
    where = ["--catalog", catalog(store)] if name == "build" else [catalog(store)]
    return main([name, *where, *arguments, "--storage_options", json.dumps(store.options)])


def build(store: Store, *inputs: str, flags: tuple[str, ...] = ()) -> int:
    model = ("--model", TOY, "--device", "cpu", "--max_failure_rate", "0.5")
    return command(store, "build", "--input", *inputs, *model, *flags)


def rows(store: Store, table: str = "images") -> list[dict]:
    uri = f"{catalog(store)}/{table}"
    return DeltaTable(uri, storage_options=storage.delta_options(uri, store.options)).to_pyarrow_table().to_pylist()


def keys(store: Store) -> list[int]:
    return sorted(int(row["key"]) for row in rows(store))


def found(store: Store, capsys: pytest.CaptureFixture) -> set[int]:
    """Keys of all images that a search finds."""
    capsys.readouterr()
    assert command(store, "search", "a red picture", "--json", "-k", "100") == 0
    return {int(row["key"]) for row in json.loads(capsys.readouterr().out)["results"]}


def test_the_life_of_a_catalog(store: Store, corpus: list[str], capsys: pytest.CaptureFixture) -> None:
    assert build(store, *corpus) == 0
    assert keys(store) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [(row["uri"], row["reason"]) for row in rows(store, "failures")] == [
        (f"{store.uri}/photos/9.jpg", "missing_file")
    ]
    assert found(store, capsys) == set(range(1, 9))

    assert build(store, *corpus) == 0
    assert "nothing to do" in capsys.readouterr().out

    put(store, "photos/9.jpg", jpeg(9))
    assert command(store, "retry") == 0
    assert keys(store) == list(range(1, 10)) and rows(store, "failures") == []

    put(store, "b.tar", shard(5, 6, 10))
    assert build(store, *corpus) == 0
    assert keys(store) == [1, 2, 3, 5, 6, 7, 8, 9, 10] and found(store, capsys) == {1, 2, 3, 5, 6, 7, 8, 9, 10}

    assert build(store, corpus[0], corpus[2], flags=("--prune",)) == 0
    assert keys(store) == [1, 2, 3, 7, 8, 9]

    capsys.readouterr()
    assert command(store, "history", "--json") == 0
    runs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [run["action"] for run in runs] == ["build", "build", "retry", "build"]
    assert [(run["added"], run["changed"], run["removed"]) for run in runs] == [
        (0, 0, 3),
        (1, 0, 1),
        (1, 0, 0),
        (8, 0, 0),
    ]

    assert command(store, "rollback", runs[-1]["run"]) == 0
    assert keys(store) == [1, 2, 3, 4, 5, 6, 7, 8] and len(rows(store, "failures")) == 1
    assert found(store, capsys) == set(range(1, 9))

    assert command(store, "clean", "--older_than", "0m") == 0
    assert keys(store) == [1, 2, 3, 4, 5, 6, 7, 8] and found(store, capsys) == set(range(1, 9))
    assert command(store, "history", "--json") == 0
    runs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [run["can_go_back"] for run in runs] == [True, False, False, False, True]


def test_of_two_runs_at_once_one_wins(
    store: Store, corpus: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one commits between the first one's last look at the table and its commit."""
    assert build(store, corpus[0]) == 0
    look = delta_tables.live_parts

    def live_parts_then_the_other_run(table: DeltaTable) -> list:
        live = look(table)
        if "/images" in table.table_uri:
            monkeypatch.setattr(delta_tables, "live_parts", look)
            assert build(store, corpus[2]) == 0
        return live

    monkeypatch.setattr(delta_tables, "live_parts", live_parts_then_the_other_run)
    assert build(store, corpus[1]) == 1
    assert "another run changed" in capsys.readouterr().err
    assert keys(store) == [1, 2, 3, 7, 8]
    assert build(store, corpus[1]) == 0
    assert "1 of them finished by an earlier run" in capsys.readouterr().out
    assert keys(store) == [1, 2, 3, 4, 5, 6, 7, 8] and found(store, capsys) == set(range(1, 9))


# --- faults --------------------------------------------------------------------------------------


@pytest.fixture
def proxy(server: Store) -> Iterator[Proxy]:
    with Proxy(server.address) as proxy:
        yield proxy


def behind(proxy: Proxy, store: Store) -> Store:
    """The store behind a proxy, for a client that does not wait long."""
    impatient = {"s3": {"config_kwargs": {"read_timeout": 1}}, "gs": {"requests_timeout": 1}}
    behind = store.at(proxy.url)
    return replace(behind, options={**behind.options, **impatient[storage.scheme_of(store.uri)]})


def identities(store: Store) -> list[tuple]:
    names = ("image_id", "uri", "content_sha256", "caption", "width")
    return sorted(tuple(row[name] for name in names) for row in rows(store))


FAULTS = {
    "errors": [Rule(500, every=3)],
    "cut": [
        Rule(CUT_READ, every=7, methods="GET"),
        Rule(CUT_WRITE, every=3, methods="PUT POST"),
        Rule(LOST_ANSWER, every=4, methods="PUT POST"),
    ],
    "lost": [Rule(RESET, every=5), Rule(LOST_ANSWER, every=7)],
    "time-outs": [Rule(HANG, every=9)],
}


@pytest.mark.parametrize(
    "faults",
    ["errors", "cut", pytest.param("lost", marks=pytest.mark.slow), pytest.param("time-outs", marks=pytest.mark.slow)],
)
def test_faults_change_nothing(
    store: Store, corpus: list[str], proxy: Proxy, faults: str, capsys: pytest.CaptureFixture
) -> None:
    store = replace(store, uri=f"{store.uri}-{faults}")
    undisturbed = replace(store, uri=f"{store.uri}/undisturbed")
    assert build(undisturbed, *corpus) == 0

    faulty = behind(proxy, store)
    proxy.fail(*FAULTS[faults])
    assert build(faulty, *corpus) == 0
    assert proxy.num_failed() >= 3
    assert build(faulty, *corpus) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert found(faulty, capsys) == set(range(1, 9))

    assert identities(store) == identities(undisturbed)
    vectors = [{row["uri"]: row["image_embedding"] for row in rows(each)} for each in (store, undisturbed)]
    for uri, vector in vectors[0].items():
        assert vector == pytest.approx(vectors[1][uri], abs=1e-5)
    reasons = [[row["reason"] for row in rows(each, "failures")] for each in (store, undisturbed)]
    assert reasons == [["missing_file"]] * 2


@pytest.mark.slow
def test_storage_that_stays_away(
    store: Store,
    corpus: list[str],
    proxy: Proxy,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With less patience than by default: what ends after half a minute is to end after some seconds."""
    monkeypatch.setattr(storage, "_ATTEMPTS", 4)
    monkeypatch.setattr(storage, "persistent", lambda function: function)
    monkeypatch.setitem(storage._DELTA_PATIENCE, "retry_timeout", "2s")
    faulty = behind(proxy, store)
    proxy.fail()
    assert build(faulty, corpus[0]) == 0
    num_requests = len(proxy.seen())

    for num_passed in (0, num_requests // 3, 2 * num_requests // 3):  # before the plan, in the work, at the commit
        proxy.fail(Rule(503, after=num_passed))
        started = time.monotonic()
        assert build(faulty, *corpus) == 1
        assert time.monotonic() - started < 120
        message = capsys.readouterr().err
        assert "beamsight build: failed: " in message and "run the same command again" in message
        assert "Traceback" not in message and "\x1b" not in message
        assert keys(store) == [1, 2, 3]
    proxy.stop()
    assert build(faulty, *corpus) == 1
    assert f"cannot reach {catalog(store)}: " in capsys.readouterr().err
    with Proxy(store.address, port=proxy.port):
        assert build(faulty, *corpus) == 0
    assert keys(store) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_wrong_places_and_credentials(
    store: Store, corpus: list[str], proxy: Proxy, capsys: pytest.CaptureFixture
) -> None:
    nowhere = replace(store, uri=store.uri.replace("corpus", "not-there"))
    assert build(nowhere, corpus[0]) == 2
    assert f"there is no bucket {nowhere.uri.rpartition('/')[0]}; make it, or name another" in capsys.readouterr().err
    assert build(store, f"{nowhere.uri}/a.tar") == 2
    assert f"no input matches '{nowhere.uri}/a.tar'" in capsys.readouterr().err
    assert command(nowhere, "search", "a red picture") == 2
    assert "check its name, and the credentials and the endpoint in --storage_options" in capsys.readouterr().err

    faulty = behind(proxy, store)
    proxy.fail(Rule(403))
    for name in ("build", "search"):
        code = build(faulty, corpus[0]) if name == "build" else command(faulty, "search", "a red picture")
        message = capsys.readouterr().err
        assert code == 2 and message.count("\n") == 1
        assert f"'{catalog(store)}" in message and "cannot be reached: " in message and "check its name" in message
    proxy.fail(Rule(403, methods="PUT POST"))
    assert build(faulty, corpus[0]) == 1
    assert f"cannot write {catalog(store)}/" in capsys.readouterr().err
    assert len([each for each in proxy.seen() if each.fault]) <= 4
