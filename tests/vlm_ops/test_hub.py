"""Where the files of a model come from: directories, the cache, a hub that is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hubs import FakeHub, save_tiny
from vlm_ops.models import describe_model, hub, load_image_backbone

SPEC = "hf:someone/tiny"
# What repositories hold besides what is read here.
OTHER_FILES = (
    "README.md", ".gitattributes", "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "tiny-q4.gguf",
    "onnx/model.onnx", "onnx/config.json", "modeling_tiny.py", "model.fp16.safetensors", "optimizer.pt",
)  # fmt: skip
MODEL_FILES = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def repository(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it is published, with all that is not needed."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    for name in OTHER_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"something else")
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(tmp_path / "cache", monkeypatch) as running:
        yield running


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- repositories ---------------------------------------------------------------------------------


def test_a_repository_is_fetched_once(
    server: FakeHub, repository: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.publish("someone/tiny", repository)
    directory, spec = hub.locate(SPEC)
    assert spec == f"{SPEC}@{commit}" and names_in(directory) == MODEL_FILES
    assert hub.revision_of(directory) == hub.revision_of(tiny)
    num_requests = len(server.requests)
    for again in (SPEC, f"{SPEC}@main", spec):
        assert hub.locate(again) == (directory, spec)
    info = describe_model(SPEC)
    assert (info.spec, info.revision) == (spec, hub.revision_of(tiny))
    assert len(server.requests) == num_requests
    server.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8))
    with torch.no_grad():
        features = load_image_backbone(spec)(pixels)["features"]
        torch.testing.assert_close(features, load_image_backbone(f"hf:{tiny}")(pixels)["features"])


def test_a_newer_commit_is_used_when_it_is_named(server: FakeHub, tiny: Path, tmp_path: Path) -> None:
    first = server.publish("someone/tiny", tiny)
    assert hub.locate(SPEC)[1] == f"{SPEC}@{first}"
    newer = save_tiny(tmp_path / "newer", seed=1)
    second = server.publish("someone/tiny", newer)
    server.publish("someone/tiny", newer, "v2")
    assert hub.locate(SPEC)[1] == f"{SPEC}@{first}"
    for named in ("v2", second):
        directory, spec = hub.locate(f"{SPEC}@{named}")
        assert spec == f"{SPEC}@{second}" and hub.revision_of(directory) == hub.revision_of(newer)
    assert hub.revision_of(hub.locate(SPEC)[0]) == hub.revision_of(tiny)


def test_torch_weights_where_there_are_no_others(server: FakeHub, tiny: Path, tmp_path: Path) -> None:
    """And shards, whose index comes with them."""
    shutil.copytree(tiny, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "old" / "tf_model.h5").write_bytes(b"")
    torch.save(load_image_backbone(f"hf:{tiny}").net.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    server.publish("someone/old", tmp_path / "old")
    assert names_in(hub.locate("hf:someone/old")[0]) == MODEL_FILES - {"model.safetensors"} | {"pytorch_model.bin"}
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        expected = load_image_backbone(f"hf:{tiny}")(pixels)["features"]
        torch.testing.assert_close(load_image_backbone("hf:someone/old")(pixels)["features"], expected)
        sharded = save_tiny(tmp_path / "sharded", max_shard_size="10KB")
        server.publish("someone/sharded", sharded)
        directory, spec = hub.locate("hf:someone/sharded")
        assert names_in(directory) == names_in(sharded) and len(hub.weights_of(directory)) > 2
        torch.testing.assert_close(load_image_backbone(spec)(pixels)["features"], expected)


def test_code_only_where_it_is_asked_for(server: FakeHub, repository: Path) -> None:
    server.publish("someone/tiny", repository)
    directory, _ = hub.locate(SPEC)
    plain = hub.revision_of(directory)
    assert hub.locate(SPEC, with_code=True)[0] == directory
    assert names_in(directory) == MODEL_FILES | {"modeling_tiny.py"}
    assert hub.revision_of(directory) == plain != hub.revision_of(directory, with_code=True)


def test_a_broken_download_goes_on(server: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.publish("someone/tiny", tiny)
    server.cut = "model.safetensors"
    with pytest.raises(
        ValueError, match="^the download of model 'hf:someone/tiny' from .* broke off .*; try again, and it goes on"
    ):
        hub.locate(SPEC)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is in the local Hugging Face cache in part only, and HF_HUB_OFFLINE is set"):
        hub.locate(SPEC)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server.cut = None
    server.requests.clear()
    assert hub.locate(SPEC)[1] == f"{SPEC}@{commit}"
    assert [path for path in server.requests if path.endswith("preprocessor_config.json")] == []


def test_what_another_program_has_fetched(server: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no list of the files. What it did not need is fetched where that can be."""
    commit = server.publish("someone/tiny", tiny)
    snapshot = server.cache / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(tiny, snapshot)
    (server.cache / "models--someone--tiny" / "refs").mkdir()
    (server.cache / "models--someone--tiny" / "refs" / "main").write_text(commit)
    assert hub.locate(SPEC) == (snapshot, f"{SPEC}@{commit}") and server.requests == []
    (snapshot / "preprocessor_config.json").unlink()
    assert hub.locate(SPEC)[0] == snapshot and names_in(snapshot) == MODEL_FILES
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is in the local Hugging Face cache in part only"):
        hub.locate(SPEC)


# --- what cannot be fetched -----------------------------------------------------------------------


def test_no_network(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "fetch it on a machine with network, `beamsight fetch-model hf:someone/tiny@v1 --to DIR`, and name hf:DIR$"
    server.stop()
    with pytest.raises(
        ValueError,
        match=f"^no model 'hf:someone/tiny@v1': 'someone/tiny' is neither a directory nor in the .* and {server.url} cannot .*{remedy}",
    ):
        hub.locate(f"{SPEC}@v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=f"is neither a directory nor in the local .* and HF_HUB_OFFLINE is set; {remedy}"
    ):
        hub.locate(f"{SPEC}@v1")


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {"X-Error-Code": "RepoNotFound"}, "no model 'hf:someone/tiny': .* is no directory, and {url} shows no such"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "{url} refuses access .401.; set HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "{url}/someone/tiny is gated; accept its conditions there, and set HF_TOKEN"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "has no revision None; name a branch"),
        (503, {}, "cannot fetch model 'hf:someone/tiny': {url} answers 503; try again later"),
    ],
    ids=["unknown", "token", "gated", "revision", "down"],
)  # fmt: skip
def test_a_hub_that_refuses(server: FakeHub, tiny: Path, status: int, headers: dict[str, str], message: str) -> None:
    server.publish("someone/tiny", tiny)
    server.refuses = status, headers
    with pytest.raises(ValueError, match=message.format(url=server.url)):
        hub.locate(SPEC)


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "{url}/someone/tiny is gated; accept its conditions there, and set HF_TOKEN"),
        (403, {}, "{url} refuses access .403.; set HF_TOKEN to a token that may read it"),
        (500, {}, "{url} answers 500; try again later"),
    ],
    ids=["gated", "forbidden", "down"],
)  # fmt: skip
def test_a_hub_that_shows_a_repository_and_refuses_its_files(
    server: FakeHub, tiny: Path, status: int, headers: dict[str, str], message: str
) -> None:
    server.publish("someone/tiny", tiny)
    server.refuses_files = status, headers
    with pytest.raises(ValueError, match=f"^cannot fetch model 'hf:someone/tiny': {message.format(url=server.url)}"):
        hub.locate(SPEC)
    server.refuses_files = None
    assert names_in(hub.locate(SPEC)[0]) == MODEL_FILES


def test_unknown_names(server: FakeHub, tiny: Path) -> None:
    server.publish("someone/tiny", tiny)
    with pytest.raises(ValueError, match="'someone/else' is no directory, and .* shows no such repository; check"):
        hub.locate("hf:someone/else")
    with pytest.raises(ValueError, match="^no model 'hf:someone/tiny@v9': .* has no revision 'v9'; name a branch"):
        hub.locate(f"{SPEC}@v9")


def test_a_private_repository(server: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("someone/tiny", tiny)
    server.token = "hf_secret"
    with pytest.raises(ValueError, match="refuses access .401.; set HF_TOKEN to a token that may read it$"):
        hub.locate(SPEC)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert names_in(hub.locate(SPEC)[0]) == MODEL_FILES


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "no space is left in .*cache; free some, or set HF_HOME to another"),
        (PermissionError(13, "Permission denied"), ".*cache cannot be written to .*; set HF_HOME to a folder that can"),
    ],
)  # fmt: skip
def test_a_cache_that_takes_no_more(
    server: FakeHub, tiny: Path, error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    server.publish("someone/tiny", tiny)
    monkeypatch.setattr("huggingface_hub.file_download._download_to_tmp_and_move", fail)
    with pytest.raises(ValueError, match=f"^cannot fetch model 'hf:someone/tiny': {message}"):
        hub.locate(SPEC)


def test_a_repository_without_a_model(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tf_model.h5").write_bytes(b"")
    server.publish("someone/tiny", tmp_path / "model")
    with pytest.raises(
        ValueError, match="the repository has no config.json with model.safetensors or pytorch_model.bin"
    ):
        hub.locate(SPEC)
    assert not server.cache.exists()


# --- directories ----------------------------------------------------------------------------------


def test_a_directory_wins(server: FakeHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert hub.locate(SPEC) == (tmp_path / "someone" / "tiny", f"hf:{tmp_path}/someone/tiny")
    assert server.requests == []


@pytest.mark.parametrize(
    "path",
    ["", "/no/such", "./no", "../no", "~/no", "no/such/directory", "no/", "a@", "@v1", "some one", "weights.bin"],
)
def test_what_is_a_path_is_not_looked_for_on_the_hub(
    path: str, server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is neither a directory nor the name of a repository; give the path"):
        hub.locate(f"hf:{path}")
    assert server.requests == []


def test_shards_that_are_missing(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sharded", max_shard_size="10KB")
    whole = hub.revision_of(folder)
    shards = hub.weights_of(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name} of its weights; copy all of its files there"):
        hub.revision_of(folder)
    assert whole != hub.revision_of(save_tiny(tmp_path / "other", seed=1, max_shard_size="10KB"))


def test_weights_of_another_name(tiny: Path, tmp_path: Path) -> None:
    """transformers reads them where config.json names them."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "tiny.safetensors")
    with pytest.raises(
        ValueError, match=r"there is no model.safetensors \(tiny.safetensors: no name that transformers"
    ):
        hub.revision_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "tiny.safetensors"}))
    assert hub.weights_of(folder) == [folder / "tiny.safetensors"]
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        features = load_image_backbone(f"hf:{folder}")(pixels)["features"]
        torch.testing.assert_close(features, load_image_backbone(f"hf:{tiny}")(pixels)["features"])


# --- a directory of its own -----------------------------------------------------------------------


def test_fetching_into_a_directory(server: FakeHub, repository: Path, tiny: Path, tmp_path: Path) -> None:
    commit = server.publish("someone/tiny", repository)
    folder = tmp_path / "models" / "tiny"
    server.cut = "model.safetensors"
    with pytest.raises(ValueError, match="broke off"):
        hub.fetch_repository(SPEC, folder)
    assert not (folder / "config.json").exists()
    server.cut = None
    assert hub.fetch_repository(SPEC, folder) == f"{SPEC}@{commit}"
    assert names_in(folder) == MODEL_FILES | {"fetched.json"}
    assert hub.revision_of(folder) == hub.revision_of(tiny) and not server.cache.exists()
    server.requests.clear()
    assert hub.fetch_repository(SPEC, folder) == f"{SPEC}@{commit}"
    assert len(server.requests) == 1
    server.publish("someone/tiny", save_tiny(tmp_path / "newer", seed=1))
    with pytest.raises(ValueError, match=f"holds {SPEC}@{commit}, not {SPEC}@.*; name another directory, or delete it"):
        hub.fetch_repository(SPEC, folder)
    with pytest.raises(ValueError, match="is there already and holds something else; name a new directory"):
        hub.fetch_repository(SPEC, tiny)
