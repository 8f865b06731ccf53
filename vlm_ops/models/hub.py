"""Where the files of a model of transformers are: in a directory, or in a repository of the Hugging Face hub.

A repository is fetched once, into the cache of huggingface_hub (`HF_HOME`), and from then on used as it is, without asking the
network: what runs every night gives the same numbers until somebody names another revision. Its spec says which commit
that is, so workers on other machines fetch the very same files. `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_TOKEN` are heeded.

Weights are safetensors, or what `torch.load(weights_only=True)` reads; files of other kinds are neither fetched nor read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from vlm_ops.models.backbones import sha256_of

logger = logging.getLogger(__name__)

# What transformers looks for, in its order (transformers 5.23, modeling_utils.py, _get_resolved_checkpoint_files).
_WEIGHTS_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# The same in a list of names, where no index can be read.
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
# What holds the words of a tokenizer.
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
# What reading weights raises, by whatever of them is broken.
BROKEN_WEIGHTS = (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError)

Choice = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Repository:
    """Attributes:
    name: `OWNER/NAME`.
    spec: By which a person has named the model that is in it, for messages.
    revision: A branch, a tag or a commit; None: the main branch.
    """

    name: str
    spec: str
    revision: str | None = None


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
    if is_directory(spec):
        path = Path(spec.removeprefix("hf:")).expanduser().resolve()
        return path, f"hf:{path}"
    repository = _repository(spec)
    directory = find(repository, lambda names: _needed(names, spec, with_code), _BESIDES_WEIGHTS)
    return directory, f"hf:{repository.name}@{directory.name}"


def find(repository: Repository, choose: Choice, besides: Sequence[str] = ()) -> Path:
    """Where chosen files of a repository are: in the cache, into which they are fetched if one is missing there.

    Args:
        choose: Of the names of a repository's files, those that are needed; raises ValueError where something is lacking.
        besides: What another program that has filled the cache may have left out: one of them at least is there.

    Raises:
        ValueError: There is no such repository, it cannot be fetched from here, or `choose` has raised it.
    """
    directory = _snapshot(repository)
    if directory is not None and _is_whole(repository, directory, choose, besides):
        return directory
    if directory is not None:  # begun: the same commit goes on
        repository = replace(repository, revision=directory.name)
    _, names = _list(repository, choose)
    logger.info("fetching %s (once; kept in the Hugging Face cache)", repository.spec)
    return _download(repository, names)


def is_directory(spec: str) -> bool:
    """Whether `hf:ARGUMENT` names a directory that is here."""
    argument = spec.removeprefix("hf:")
    return bool(argument) and os.path.isdir(Path(argument).expanduser())


def fetch_repository(spec: str, directory: Path, with_code: bool = False) -> str:
    """Fetches a repository into a directory of its own, and gives the spec with the commit that it is of.

    The hub is asked which commit that is. `config.json` comes last, so that what was broken off is no model yet;
    the same call goes on with it.

    Raises:
        ValueError: There is no such repository, it cannot be fetched from here, or the directory holds something else.
    """
    repository = _repository(spec)
    commit, names = _list(repository, lambda names: _needed(names, spec, with_code))
    full_spec = f"hf:{repository.name}@{commit}"
    claim(directory, full_spec)
    if not (directory / "config.json").is_file():
        pinned = replace(repository, revision=commit)
        _download(pinned, [name for name in names if name != "config.json"], directory)
        _download(pinned, ["config.json"], directory)
        tidy(directory)
    return full_spec


def tidy(directory: Path) -> None:
    """Deletes what huggingface_hub notes beside files while it fetches them."""
    shutil.rmtree(directory / ".cache" / "huggingface", ignore_errors=True)
    with contextlib.suppress(OSError):  # somebody else's cache is there, too
        (directory / ".cache").rmdir()


def download(repository: Repository, choose: Choice, directory: Path) -> None:
    """Fetches chosen files of a repository into a directory, as far as they are not there.

    Raises:
        ValueError: There is no such repository, it cannot be fetched from here, or `choose` has raised it.
    """
    commit, names = _list(repository, choose)
    _download(replace(repository, revision=commit), names, directory)


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
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    known = (config.get("transformers_weights"), *_WEIGHTS_FILES)  # the first is for weights of a name of their own
    found = [name for name in known if name and (directory / name).is_file()][:1]
    if not found:
        others = sorted(path.name for path in directory.glob("*.safetensors"))[:3]
        hint = f" ({', '.join(others)}: no name that transformers looks for)" if others else ""
        raise ValueError(
            f"the model in {str(directory)!r} has no weights: there is no model.safetensors{hint}; save_pretrained writes one"
        )
    if found[0].endswith(".index.json"):
        found = sorted(set(read_json(directory / found[0]).get("weight_map", {}).values()))
    if missing := [name for name in found if not (directory / name).is_file()]:
        raise ValueError(
            f"the model in {str(directory)!r} lacks {', '.join(missing[:3])} of its weights; copy all of its files there"
        )
    return [directory / name for name in found]


def check_code(spec: str, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Whether the code that lies in a model's repository may be run.

    Args:
        config: The model's `config.json`, whose `auto_map` names the code.

    Raises:
        ValueError: Nobody has allowed it, or it is that of another repository, which would be neither pinned nor a part of
            the revision.
    """
    if not trust_remote_code:
        raise ValueError(
            f"model {spec!r} runs code that lies in its repository; it can do whatever you can: read it, and allow it with "
            "--trust_remote_code if you trust it"
        )
    for references in config["auto_map"].values():
        # Of a tokenizer there may be two, one of which may be None.
        for reference in filter(None, references if isinstance(references, list) else [references]):
            if "--" in reference:
                raise ValueError(
                    f"model {spec!r} runs code of another repository, {reference.partition('--')[0]!r}, which is not supported; "
                    "copy that code beside the model, and name it in auto_map without the repository"
                )


def check_tokenizer(directory: Path, trust_remote_code: bool = False) -> None:
    """Raises:
    ValueError: There are no words of a tokenizer: transformers would make one that knows none.
    """
    if trust_remote_code or any(True for pattern in _TOKENIZERS for _ in directory.glob(pattern)):
        return
    raise ValueError(
        f"the model in {str(directory)!r} has no tokenizer (tokenizer.json); save its own there "
        "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
    )


def why_unreadable(error: Exception) -> str:
    """What is wrong with weights, in a line."""
    if isinstance(error, UnpicklingError) or "weights_only" in str(error):
        return "they hold pickled objects, which may be code and are refused; get them as safetensors"
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of a model while it loads; what matters is looked at here."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


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


def _repository(spec: str) -> Repository:
    """That of a spec that is no directory.

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
    return Repository(repo, spec, revision or None)


def _weights(names: Iterable[str]) -> list[str]:
    """Those of some files that hold the weights, of the best kind of which all are there."""
    names = list(names)
    for pattern in _WEIGHTS:
        found = sorted(filter(pattern.fullmatch, names))
        num_shards = re.search(r"-of-(\d+)", found[0]) if found else None
        if found and (num_shards is None or len(found) == int(num_shards[1])):
            return found
    return []


def _needed(names: Iterable[str], spec: str, with_code: bool) -> list[str]:
    """Those of a repository's files that a model is made of: none in folders, which hold it in other formats."""
    top = sorted(name for name in names if "/" not in name)
    weights = _weights(top)
    if "config.json" not in top or not weights:
        raise ValueError(
            f"cannot load model {spec!r}: the repository has no config.json with model.safetensors or pytorch_model.bin, "
            "so it holds no model of transformers with weights that are safe to read; name another one"
        )
    suffixes = (*_SUFFIXES, ".py") if with_code else _SUFFIXES
    return [*(name for name in top if name.endswith(suffixes)), *weights]


def _snapshot(repository: Repository) -> Path | None:
    """The directory of the cache for a revision, where some of its files are there."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository.name, repo_type="model")
    revision = repository.revision or constants.DEFAULT_REVISION
    note = folder / "refs" / revision
    directory = folder / "snapshots" / (note.read_text().strip() if note.is_file() else revision)
    return directory if directory.is_dir() else None


def _is_whole(repository: Repository, directory: Path, choose: Choice, besides: Sequence[str]) -> bool:
    """Whether nothing is missing in a snapshot of the cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        names = [file.path for file in get_cached_repo_tree(repository.name, revision=directory.name)]
    except CachedRepoTreeNotFoundError:  # another program has fetched it, file by file
        names = [path.name for path in directory.iterdir()]
        if besides and not set(besides).intersection(names):
            return False
    try:
        return all((directory / name).is_file() for name in choose(names))
    except ValueError:
        return False


def _list(repository: Repository, choose: Choice) -> tuple[str, Sequence[str]]:
    """The commit that a revision is, and which of its files are needed.

    Raises:
        ValueError: The hub cannot be asked or has no such repository, or `choose` has raised it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import DEFAULT_ETAG_TIMEOUT

    try:
        info = HfApi().model_info(repository.name, revision=repository.revision, timeout=DEFAULT_ETAG_TIMEOUT)
    except Exception as error:  # those of huggingface_hub and of its HTTP library share no class
        raise ValueError(_explanation(error, repository)) from error
    assert info.sha is not None
    return info.sha, choose([file.rfilename for file in info.siblings or ()])


def _download(repository: Repository, names: Sequence[str], directory: Path | None = None) -> Path:
    """Where the files are then: in a directory, or in the cache."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # transformers takes them away, and log files need none
        (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    patterns = [glob.escape(name) for name in names]
    try:
        return Path(
            snapshot_download(
                repository.name, revision=repository.revision, allow_patterns=patterns, local_dir=directory
            )
        )
    except Exception as error:  # those of huggingface_hub and of its HTTP library share no class
        raise ValueError(_explanation(error, repository, directory or constants.HF_HUB_CACHE)) from error


def _explanation(error: Exception, repository: Repository, place: Path | str | None = None) -> str:
    """What went wrong and what to do, in one sentence.

    Args:
        place: Where files were being written; None before that.
    """
    from huggingface_hub import constants, errors, is_offline_mode

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # which tells more
    spec, repo, hub = repository.spec, repository.name, constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"cannot fetch model {spec!r}: {hub}/{repo} is gated; accept its conditions there, and set HF_TOKEN to a token "
            "of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no model {spec!r}: {hub}/{repo} has no revision {repository.revision!r}; name a branch, a tag or a whole commit of it"
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
        return f"the download of model {spec!r} from {hub} broke off ({reason}); try again, and it goes on with what is missing"
    why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"{hub} cannot be reached"
    state = "is in the local Hugging Face cache in part only"
    if _snapshot(repository) is None:
        state = "is neither a directory nor in the local Hugging Face cache"
    return (
        f"no model {spec!r}: {repo!r} {state}, and {why}; fetch it on a machine with network, "
        f"`beamsight fetch-model {spec} --to DIR`, and name {spec.partition(':')[0]}:DIR"
    )
