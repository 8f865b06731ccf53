"""Where the files of a model of transformers are: in a directory, or in a repository of the Hugging Face hub.

A repository is fetched once, into the cache of huggingface_hub (`HF_HOME`), and from then on used as it is, without asking the
network: what runs every night gives the same numbers until somebody names another revision. Its spec says which commit
that is, so workers on other machines fetch the very same files. `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_TOKEN` are heeded.

Weights are safetensors, or what `torch.load(weights_only=True)` reads; files of other kinds are neither fetched nor read.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from vlm_ops.models.backbones import sha256_of

logger = logging.getLogger(__name__)

# The names of weights that transformers looks for, in its order (transformers 5.23, modeling_utils.py,
# _get_resolved_checkpoint_files).
_WEIGHTS = tuple(
    re.compile(pattern)
    for pattern in (
        r"model\.safetensors",
        r"model-\d+-of-\d+\.safetensors",
        r"pytorch_model\.bin",
        r"pytorch_model-\d+-of-\d+\.bin",
    )
)
# Besides them, what a repository holds of a model: configurations, tokenizers, templates.
_SUFFIXES = (".jinja", ".json", ".model", ".txt")
_BESIDES_WEIGHTS = ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
# Those of them that decide about the numbers.
_SETTINGS = (
    *_BESIDES_WEIGHTS, "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
    "generation_config.json", "merges.txt", "sentence_bert_config.json", "special_tokens_map.json", "vocab.json",
    "vocab.txt",
)  # fmt: skip
_ORIGIN = "fetched.json"


def locate(spec: str, with_code: bool = False) -> tuple[Path, str]:
    """The directory of a model, and the spec that means it everywhere: `hf:/full/path`, or `hf:REPO@` with the
    40 digits of a commit.

    A directory wins over a repository of the same name. A repository that is not in the cache, or of which files are
    missing there, is fetched.

    Args:
        with_code: Its Python files, too.

    Raises:
        ValueError: There is no such model, or it cannot be fetched from here.
    """
    argument = spec.removeprefix("hf:")
    path = Path(argument).expanduser()
    if argument and os.path.isdir(path):
        return path.resolve(), f"hf:{path.resolve()}"
    from huggingface_hub import try_to_load_from_cache

    repo, revision = _repository(spec)
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    directory = Path(cached).parent if isinstance(cached, str) else None
    if directory is None or not _is_whole(repo, directory, with_code):
        directory = _fetch_into_cache(repo, directory.name if directory else revision, with_code)
    return directory, f"hf:{repo}@{directory.name}"


def fetch(spec: str, directory: Path, with_code: bool = False) -> str:
    """Fetches a repository into a directory of its own, and gives the spec with the commit that it is of.

    The hub is asked which commit that is. `config.json` comes last, so that what was broken off is no model yet;
    the same call goes on with it.

    Raises:
        ValueError: There is no such repository, it cannot be fetched from here, or the directory holds something else.
    """
    repo, revision = _repository(spec)
    commit, names = _list(repo, revision, with_code)
    full_spec = f"hf:{repo}@{commit}"
    claim(directory, full_spec)
    if not (directory / "config.json").is_file():
        _download(repo, commit, [name for name in names if name != "config.json"], directory)
        _download(repo, commit, ["config.json"], directory)
    return full_spec


def claim(directory: Path, origin: str) -> None:
    """Takes a directory for what is fetched into it, and notes there what that is.

    Raises:
        ValueError: Something else is in it.
    """
    note = directory / _ORIGIN
    if note.is_file():
        present = read_json(note).get("spec")
        if present != origin:
            raise ValueError(f"{str(directory)!r} holds {present}, not {origin}; name another directory, or delete it")
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{str(directory)!r} is there already and holds something else; name a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"spec": origin}) + "\n", encoding="utf-8")


def revision_of(directory: Path, with_code: bool = False) -> str:
    """12 hex digits that stand for the weights and the settings.

    Args:
        with_code: And for the Python files.

    Raises:
        ValueError: There are no weights, or not all of them.
    """
    settings = [directory / name for name in _SETTINGS if (directory / name).is_file()]
    code = sorted(directory.glob("*.py")) if with_code else []
    digests = [f"{path.name} {sha256_of(path)}" for path in [*weights_of(directory), *settings, *code]]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]


def weights_of(directory: Path) -> list[Path]:
    """The files of weights that transformers reads.

    Raises:
        ValueError: There are none, or not all that their index names.
    """
    names = sorted(path.name for path in directory.iterdir())
    config = read_json(directory / "config.json") if "config.json" in names else {}
    named = config.get("transformers_weights")  # for weights of a name of their own
    found = [named] if named else _weights(names)
    if not found:
        others = [name for name in names if name.endswith(".safetensors")]
        hint = f" ({', '.join(others[:3])} is none that transformers looks for)" if others else ""
        raise ValueError(
            f"the model in {str(directory)!r} has no weights: there is no model.safetensors{hint}; save_pretrained writes one"
        )
    index = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
    if "-of-" in found[0]:
        found = [index[PurePath(found[0]).suffix]]
    if found[0].endswith(".index.json"):
        shards = read_json(directory / found[0]).get("weight_map", {})
        found = sorted(set(shards.values()))
    if missing := [name for name in found if not (directory / name).is_file()]:
        raise ValueError(
            f"the model in {str(directory)!r} lacks {', '.join(missing[:3])} of its weights; copy all of its files there"
        )
    return [directory / name for name in found]


def read_json(path: Path) -> dict[str, Any]:
    """Raises:
    ValueError: There is no such file, or it holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"no model in {str(path.parent)!r}: there is no {path.name}; save_pretrained writes one"
        ) from error
    except ValueError as error:
        raise ValueError(f"the model in {str(path.parent)!r} cannot be read: {path.name}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the model in {str(path.parent)!r} cannot be read: {path.name} holds no JSON object")
    return values


def _repository(spec: str) -> tuple[str, str | None]:
    """Name and revision of a spec that is no directory.

    Raises:
        ValueError: It is a path, or nothing that a repository could be called.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    argument = spec.removeprefix("hf:")
    repo, at, revision = argument.partition("@")
    try:
        validate_repo_id(repo)
        is_name = bool(revision) == bool(at) and not argument.startswith((".", "~")) and not os.path.exists(argument)
    except HFValidationError:
        is_name = False
    if not is_name:
        raise ValueError(
            f"no model {spec!r}: {argument!r} is neither a directory nor the name of a repository; give the path of a "
            "model's directory, or OWNER/NAME of one on the Hugging Face hub"
        )
    return repo, revision or None


def _weights(names: Iterable[str]) -> list[str]:
    """Those of some files that hold the weights, of the best kind that is there."""
    names = list(names)
    found = (sorted(filter(pattern.fullmatch, names)) for pattern in _WEIGHTS)
    return next(filter(None, found), [])


def _needed(names: Iterable[str], with_code: bool) -> list[str]:
    """Those of a repository's files that a model is made of: none in folders, which hold it in other formats."""
    top = sorted(name for name in names if "/" not in name)
    suffixes = (*_SUFFIXES, ".py") if with_code else _SUFFIXES
    return [*(name for name in top if name.endswith(suffixes)), *_weights(top)]


def _is_whole(repo: str, directory: Path, with_code: bool) -> bool:
    """Whether nothing is missing in a snapshot of the cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(repo, revision=directory.name)
        return all((directory / name).is_file() for name in _needed((file.path for file in files), with_code))
    except CachedRepoTreeNotFoundError:  # another program has fetched it, file by file
        pass
    try:
        weights_of(directory)
    except ValueError:
        return False
    has_code = not with_code or any(directory.glob("*.py"))
    return has_code and any((directory / name).is_file() for name in _BESIDES_WEIGHTS)


def _fetch_into_cache(repo: str, revision: str | None, with_code: bool) -> Path:
    _, names = _list(repo, revision, with_code)
    logger.info("fetching hf:%s (once; kept in the Hugging Face cache)", repo)
    return _download(repo, revision, names)


def _list(repo: str, revision: str | None, with_code: bool) -> tuple[str, list[str]]:
    """The commit that a revision is, and which of its files are needed.

    Raises:
        ValueError: The hub cannot be asked or has no such repository, or that holds no model of transformers.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import DEFAULT_ETAG_TIMEOUT

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=DEFAULT_ETAG_TIMEOUT)
    except Exception as error:  # those of huggingface_hub and of its HTTP library share no class
        raise ValueError(_explanation(error, repo, revision)) from error
    names = [file.rfilename for file in info.siblings or ()]
    if "config.json" not in names or not _weights(names):
        raise ValueError(
            f"cannot load model 'hf:{repo}': the repository has no config.json with model.safetensors or pytorch_model.bin, "
            "so it holds no model of transformers with weights that are safe to read; name another one"
        )
    assert info.sha is not None
    return info.sha, _needed(names, with_code)


def _download(repo: str, revision: str | None, names: Sequence[str], directory: Path | None = None) -> Path:
    """Where the files are then: in a directory, or in the cache."""
    from huggingface_hub import constants, snapshot_download

    patterns = [glob.escape(name) for name in names]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_dir=directory))
    except Exception as error:  # those of huggingface_hub and of its HTTP library share no class
        raise ValueError(_explanation(error, repo, revision, directory or constants.HF_HUB_CACHE)) from error


def _explanation(error: Exception, repo: str, revision: str | None, place: Path | str | None = None) -> str:
    """What went wrong and what to do, in one sentence.

    Args:
        place: Where files were being written; None before that.
    """
    from huggingface_hub import constants, errors, is_offline_mode

    spec = f"hf:{repo}@{revision}" if revision else f"hf:{repo}"
    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"cannot fetch model {spec!r}: {hub}/{repo} is gated; accept its conditions there, and set HF_TOKEN to a token "
            "of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no model {spec!r}: {hub}/{repo} has no revision {revision!r}; name a branch, a tag or a whole commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no model {spec!r}: {repo!r} is no directory, and {hub} shows no such repository; check the name, and set "
            "HF_TOKEN if it is private"
        )
    if status in (401, 403):
        return f"cannot fetch model {spec!r}: {hub} refuses access ({status}); set HF_TOKEN to a token that may read it"
    if status is not None:
        return f"cannot fetch model {spec!r}: {hub} answers {status}; try again later"
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return (
            f"cannot fetch model {spec!r}: no space is left in {place}; free some, or set HF_HOME to another disk; what was "
            "fetched is kept"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot fetch model {spec!r}: {place} cannot be written to ({error}); set HF_HOME to a folder that can"
    if place:
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"the download of model {spec!r} from {hub} broke off ({reason}); try again, and it goes on where it stopped"
    why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"{hub} cannot be reached"
    state = "is in the local Hugging Face cache in part only"
    if not _is_begun(repo, revision):
        state = "is neither a directory nor in the local Hugging Face cache"
    return (
        f"no model {spec!r}: {repo!r} {state}, and {why}; fetch it on a machine with network, "
        f"`beamsight fetch-model {spec} --to DIR`, and name hf:DIR"
    )


def _is_begun(repo: str, revision: str | None) -> bool:
    """Whether the cache holds some of its files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    return (folder / "refs" / (revision or constants.DEFAULT_REVISION)).is_file() or (
        revision is not None and (folder / "snapshots" / revision).is_dir()
    )
