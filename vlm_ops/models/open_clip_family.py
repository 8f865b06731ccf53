"""`open_clip:ARCH/PRETRAINED` or `open_clip:DIRECTORY`: the dual encoders of open_clip, where `open_clip_torch` is installed.

PRETRAINED is a tag that open_clip knows for the architecture (`open_clip:ViT-B-32/laion2b_s34b_b79k`), whose weights are
fetched once into the Hugging Face cache, or the path of a file of weights, whose images are prepared in open_clip's
usual way. A directory holds `open_clip_config.json`, weights, and a tokenizer where the model has one of its own, as
open_clip's repositories on the hub do.

`embedding` is open_clip's own. `features` are what the image tower pools before its projection, or, where pooling
projects (ResNets), the embedding before it is normalised; `grid` are the patch tokens of open_clip's own transformers.
All is as in open_clip 3.3's factory.py, but for one thing: weights that were trained with QuickGELU are run with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from vlm_ops.models import ImageBackbone, ModelInfo, TextBackbone, Tokenizer, hub
from vlm_ops.models.backbones import BackboneImageModel, BackboneTextModel, sha256_of
from vlm_ops.models.settings import ModelSettings
from vlm_ops.preprocessing import Preprocessing

try:
    import open_clip
    from open_clip.timm_model import TimmModel
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict
    from open_clip.transformer import VisionTransformer
except ImportError as error:
    raise ImportError(f"it needs open_clip_torch; pip install 'beamsight[open_clip]' ({error})") from error

CONFIG = "open_clip_config.json"
# The names that open_clip prefers among the weights of a directory (factory.py, _find_checkpoint_in_dir).
_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_TOKENIZER = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
_TEXT_TOWER = "text_tower"


@dataclass(frozen=True)
class _Source:
    """What a spec stands for.

    Attributes:
        spec: With full paths.
        model: open_clip's `model_cfg`.
        preprocess: Its `preprocess_cfg`, as far as it differs from the usual one.
        weights: The file.
        directory: That holds them all; None for an architecture that open_clip knows.
    """

    spec: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path
    directory: Path | None = None


def describe(spec: str, settings: ModelSettings | None = None) -> ModelInfo:
    """Hashes the weights once a process; fetches those of a tag.

    Raises:
        ValueError: There is no such model, it cannot be fetched, or its preprocessing cannot be followed.
    """
    source = _source(spec)
    _preprocessing(source)
    return ModelInfo(source.spec, _revision(source), _produces(source.model["vision_cfg"]))


def load_image_model(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> BackboneImageModel:
    preprocessing = _preprocessing(_source(spec))
    return BackboneImageModel(describe(spec), preprocessing, lambda: load_image_backbone(spec), settings, outputs)


def load_text_model(spec: str, settings: ModelSettings) -> BackboneTextModel:
    return BackboneTextModel(describe(spec), load_tokenizer(spec), lambda: load_text_backbone(spec), settings)


def load_image_backbone(spec: str) -> ImageBackbone:
    """The image tower.

    Raises:
        ValueError: The weights do not fit, or cannot be read.
    """
    source = _source(spec)
    return OpenClipImageBackbone(_load(source), _preprocess_cfg(source), _produces(source.model["vision_cfg"])).eval()


def load_text_backbone(spec: str) -> TextBackbone:
    """The text tower.

    Raises:
        ValueError: The weights do not fit, or cannot be read.
    """
    source = _source(spec)
    return OpenClipTextBackbone(_load(source), _context_length(source), _pad_id(_tokenizer(source))).eval()


def load_tokenizer(spec: str) -> Tokenizer:
    """open_clip's own, cut behind the longest text."""
    source = _source(spec)
    tokenizer = _tokenizer(source)
    pad_id = _pad_id(tokenizer)

    def tokenize(texts: Sequence[str]) -> dict[str, np.ndarray]:
        ids = tokenizer(list(texts)).numpy().astype(np.int64)
        mask = (ids != pad_id).astype(np.int64)
        length = max(1, int((mask * np.arange(1, ids.shape[1] + 1)).max(initial=0)))
        return {"ids": ids[:, :length], "mask": mask[:, :length]}

    return tokenize


def fetch(spec: str, directory: Path, settings: ModelSettings) -> str | None:
    """Makes a directory of a tag, which open_clip itself can load, too (`local-dir:`)."""
    argument, path = _argument(spec)
    arch, _, tag = argument.partition("/")
    if path.is_dir() or _weights_file(tag):
        _source(spec)
        return None
    model, preprocess, repository, choose = _pretrained(spec, arch, tag)
    hub.claim(directory, f"open_clip:{arch}/{tag}")
    if not (directory / CONFIG).is_file():
        hub.download(repository, choose, directory)
        text = model["text_cfg"]
        if "hf_tokenizer_name" in text:
            hub.download(hub.Repository(text["hf_tokenizer_name"], spec), _tokenizer_files, directory)
        if "hf_model_name" in text:
            hub.download(
                hub.Repository(text["hf_model_name"], spec), lambda names: ["config.json"], directory / _TEXT_TOWER
            )
        config = {"model_cfg": model, "preprocess_cfg": preprocess}
        scratch = directory / f"{CONFIG}.making"
        scratch.write_text(json.dumps(config, indent=2), encoding="utf-8")
        scratch.replace(directory / CONFIG)  # what is broken off before is no model yet
        hub.tidy(directory)
    return f"open_clip:{directory.resolve()}"


class OpenClipImageBackbone(nn.Module):
    """An `ImageBackbone`: the image tower of an open_clip model.

    Args:
        net: The model; its image tower is taken apart.
        produces: Which of `features`, `grid` and `embedding` it gives.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: Any, cfg: PreprocessCfg, produces: frozenset[str]) -> None:
        super().__init__()
        self.visual = net.visual
        self.preprocessing = _square(cfg)
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1), persistent=False)
        self.produces = produces
        if "grid" in produces:
            self.visual.output_tokens = True
        if isinstance(self.visual, VisionTransformer):
            self.projection, self.visual.proj = self.visual.proj, None
        with torch.no_grad():
            size = self.preprocessing.size
            outputs = self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        dims = {name: output.shape[-1] for name, output in outputs.items()}
        self.feature_dim, self.grid_dim, self.embedding_dim = dims["features"], dims.get("grid", 0), dims["embedding"]

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self._towers((pixels.float() / 255 - self.mean) / self.std)
        outputs["embedding"] = F.normalize(outputs["embedding"], dim=-1)
        return {name: output for name, output in outputs.items() if name in self.produces}

    def _towers(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(self.visual, VisionTransformer):
            output = self.visual(images)
            features, grid = output if isinstance(output, tuple) else (output, None)
            embedding = features if self.projection is None else features @ self.projection
            return {"features": features, "embedding": embedding} | ({} if grid is None else {"grid": grid})
        if isinstance(self.visual, TimmModel) and not hasattr(self.visual.head, "pool"):
            features = self.visual.trunk(images)
            return {"features": features, "embedding": self.visual.head(features)}
        embedding = self.visual(images)
        return {"features": embedding, "embedding": embedding}


class OpenClipTextBackbone(nn.Module):
    """A `TextBackbone`: the text tower of an open_clip model, which takes texts of one length."""

    def __init__(self, net: Any, context_length: int, pad_id: int) -> None:
        super().__init__()
        self.net = net
        self.net.visual = None
        self.context_length = context_length
        self.pad_id = pad_id
        with torch.no_grad():
            blank = torch.full((1, context_length), pad_id)
            self.text_dim = self(blank, torch.zeros_like(blank)).shape[1]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ids = torch.where(mask.bool(), ids, self.pad_id)
        return self.net.encode_text(
            F.pad(ids, (0, self.context_length - ids.shape[1]), value=self.pad_id), normalize=True
        )


# --- what a spec stands for -----------------------------------------------------------------------


def _argument(spec: str) -> tuple[str, Path]:
    argument = spec.removeprefix("open_clip:")
    return argument, Path(argument).expanduser() if argument else Path("/dev/null")


def _source(spec: str) -> _Source:
    """Raises:
    ValueError: There is no such directory, architecture, tag or file, or it cannot be fetched.
    """
    argument, path = _argument(spec)
    if path.is_dir():
        return _directory_source(path.resolve())
    arch, _, tag = argument.partition("/")
    if file := _weights_file(tag):
        model = _architecture(spec, arch)
        return _Source(f"open_clip:{arch}/{file}", model, {}, file)
    model, preprocess, repository, choose = _pretrained(spec, arch, tag)
    weights = hub.find(repository, choose)
    return _Source(
        f"open_clip:{arch}/{tag}", model, preprocess, next(weights / name for name in choose(_names(weights)))
    )


def _directory_source(directory: Path) -> _Source:
    config = hub.read_json(directory / CONFIG)
    if not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"the model in {str(directory)!r} cannot be read: {CONFIG} has no model_cfg")
    names = _names(directory)
    found = [name for name in _WEIGHTS if name in names] or [name for name in names if name.endswith(_SUFFIXES)]
    if not found:
        raise ValueError(f"the model in {str(directory)!r} has no weights; put {_WEIGHTS[0]} there")
    return _Source(
        f"open_clip:{directory}", config["model_cfg"], config.get("preprocess_cfg", {}), directory / found[0], directory
    )


def _architecture(spec: str, arch: str) -> dict[str, Any]:
    model = open_clip.get_model_config(arch) if arch in open_clip.list_models() else None
    if model is None:
        raise ValueError(
            f"unknown model {spec!r}: {arch!r} is neither a directory nor an architecture of open_clip; those are "
            f"{', '.join(open_clip.list_models())}"
        )
    return model


def _pretrained(spec: str, arch: str, tag: str) -> tuple[dict[str, Any], dict[str, Any], hub.Repository, hub.Choice]:
    """`model_cfg`, `preprocess_cfg`, and which files of which repository hold the weights."""
    model = _architecture(spec, arch)
    cfg = open_clip.get_pretrained_cfg(arch, tag)
    if not cfg:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        raise ValueError(
            f"no weights {tag!r} for {arch} in {spec!r}; use {', '.join(tags) or 'a file'}, or the path of a file "
            f"({', '.join(_SUFFIXES)})"
        )
    if cfg.get("quick_gelu"):
        model["quick_gelu"] = True
    repo, _, name = cfg["hf_hub"].rpartition("/")
    return model, merge_preprocess_dict({}, cfg), hub.Repository(repo, spec), partial(_weights_in, spec, name)


def _weights_in(spec: str, name: str, names: Sequence[str]) -> list[str]:
    """The file of weights of a repository, as safetensors where it has that."""
    asked = name or "open_clip_pytorch_model.bin"
    safe = ("open_clip_model.safetensors",) if not name else ()
    for candidate in (*safe, str(Path(asked).with_suffix(".safetensors")), asked):
        if candidate in names:
            return [candidate]
    raise ValueError(f"cannot load model {spec!r}: its repository has no {asked}; use other weights")


def _tokenizer_files(names: Sequence[str]) -> list[str]:
    return [name for name in _TOKENIZER if name in names]


def _weights_file(text: str) -> Path | None:
    path = Path(text).expanduser()
    return path.resolve() if path.suffix in _SUFFIXES and path.is_file() else None


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _revision(source: _Source) -> str:
    """12 hex digits that stand for weights, configuration and tokenizer; the same for a tag and its directory."""
    config = json.dumps([source.model, merge_preprocess_dict(PreprocessCfg(), source.preprocess)], sort_keys=True)
    digest = hashlib.sha256(f"{config} {sha256_of(source.weights)}".encode())
    if "hf_tokenizer_name" in source.model["text_cfg"]:
        folder = _tokenizer_folder(source)
        for name in _tokenizer_files(_names(folder)):
            digest.update(f"{name} {sha256_of(folder / name)}".encode())
    return digest.hexdigest()[:12]


# --- open_clip ------------------------------------------------------------------------------------


def _load(source: _Source) -> Any:
    text = dict(source.model["text_cfg"])
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(_text_tower(source)), "hf_model_pretrained": False}
    vision = {**source.model["vision_cfg"]}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    config = {**source.model, "text_cfg": text, "vision_cfg": vision}
    is_custom = config.pop("custom_text", False) or "hf_model_name" in text
    kinds = (
        (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP) if is_custom else open_clip.CLIP
    )
    try:
        net = kinds(**config)
        open_clip.load_checkpoint(net, str(source.weights), weights_only=True)
    except (AttributeError, EOFError, KeyError, RuntimeError, SafetensorError, TypeError, UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the weights in {str(source.weights)!r} cannot be read as those of {source.spec!r} ({reason}); name the "
            "architecture that they belong to, or save its state_dict there"
        ) from error
    return net.eval()


def _tokenizer(source: _Source) -> Any:
    text = source.model["text_cfg"]
    length = _context_length(source)
    if "hf_tokenizer_name" not in text:
        return open_clip.SimpleTokenizer(context_length=length, **text.get("tokenizer_kwargs", {}))
    folder = _tokenizer_folder(source)
    if not _tokenizer_files(_names(folder)):
        raise ValueError(f"the model in {str(folder)!r} has no tokenizer; save its tokenizer.json there")
    return open_clip.tokenizer.HFTokenizer(
        str(folder),
        length,
        tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False,
        **text.get("tokenizer_kwargs", {}),
    )


def _tokenizer_folder(source: _Source) -> Path:
    return source.directory or hub.find(_repository(source, "hf_tokenizer_name"), _tokenizer_files)


def _repository(source: _Source, key: str) -> hub.Repository:
    return hub.Repository(source.model["text_cfg"][key], source.spec)


def _text_tower(source: _Source) -> Path | str:
    """Where the configuration of a text tower of transformers is."""
    if source.directory and (source.directory / _TEXT_TOWER / "config.json").is_file():
        return source.directory / _TEXT_TOWER
    return hub.find(_repository(source, "hf_model_name"), lambda names: ["config.json"])


def _context_length(source: _Source) -> int:
    return source.model["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)


def _pad_id(tokenizer: Any) -> int:
    return getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0


def _produces(vision: Mapping[str, Any]) -> frozenset[str]:
    """What an image tower gives, by its configuration."""
    is_own_transformer = "timm_model_name" not in vision and not isinstance(vision.get("layers", 12), list)
    has_tokens = is_own_transformer and not vision.get("attentional_pool")
    return frozenset({"features", "embedding"} | ({"grid"} if has_tokens else set()))


def _preprocess_cfg(source: _Source) -> PreprocessCfg:
    size = source.model["vision_cfg"].get("image_size", 224)
    return PreprocessCfg(**{**merge_preprocess_dict(PreprocessCfg(), source.preprocess), "size": size})


def _preprocessing(source: _Source) -> Preprocessing:
    try:
        return _square(_preprocess_cfg(source))
    except ValueError as error:
        raise ValueError(f"cannot load model {source.spec!r}: {error}") from error


def _square(cfg: PreprocessCfg) -> Preprocessing:
    sides = {cfg.size} if isinstance(cfg.size, int) else set(cfg.size)
    if len(sides) > 1:
        raise ValueError(f"its images are {' x '.join(map(str, cfg.size))}, and only squares are supported")
    if cfg.resize_mode not in ("shortest", "squash"):
        raise ValueError(f"its images are resized by {cfg.resize_mode!r}; only 'shortest' and 'squash' are supported")
    fit = "cover" if cfg.resize_mode == "shortest" else "stretch"
    interpolation = "bilinear" if cfg.interpolation == "bilinear" else "bicubic"
    return Preprocessing(sides.pop(), fit, interpolation=interpolation)
