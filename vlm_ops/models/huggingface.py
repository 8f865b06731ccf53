"""`hf:PATH` or `hf:REPO[@REVISION]`: image backbones and text encoders in the format of transformers.

A model is a directory with `config.json` and its weights: one that `save_pretrained` has written, or a
repository of the Hugging Face hub that lies in the local cache. Nothing is downloaded, and no code of a
repository is run.

Images: `features` are what the model pools (its class token, or the mean of its feature map), `grid` its
feature map or patch tokens. Texts: the mean of the last hidden states over the tokens, as sentence-transformers
pools (Reimers & Gurevych, "Sentence-BERT", EMNLP 2019).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_ops.models import ImageBackbone, ImageModel, ModelInfo, TextBackbone, Tokenizer, hf_captioners
from vlm_ops.models.backbones import BackboneImageModel, BackboneTextModel, sha256_of, tokenizer_of
from vlm_ops.models.settings import ModelSettings
from vlm_ops.preprocessing import Preprocessing

# The `model_type`s that are known to work; each gives `last_hidden_state` as this module reads it.
_CNNS = (
    "bit", "convnext", "convnextv2", "efficientnet", "mobilenet_v1", "mobilenet_v2", "poolformer", "regnet", "resnet",
)  # fmt: skip
_VITS = (
    "beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa",
    "siglip_vision_model", "swin", "swinv2", "vit", "vit_msn",
)  # fmt: skip
_TEXT_ENCODERS = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
    "xlm-roberta",
)  # fmt: skip
# Their positions are numbered from behind the padding id, so that the first of them are never used.
_SHIFTED_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")
# Besides the weights, what decides about the numbers.
_SETTINGS = (
    "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
# ConvNeXt's image processor stretches from this size on, and crops below.
_STRETCHED_FROM = 384


def describe(spec: str, settings: ModelSettings | None = None) -> ModelInfo:
    """Reads `config.json`, and hashes the weights once a process.

    Raises:
        ValueError: There is no such model here, or it is of an unknown type.
    """
    directory, full_spec = _locate(spec)
    config = _read_json(directory / "config.json")
    kind = config.get("model_type")
    if hf_captioners.is_captioner(config):
        return hf_captioners.describe(spec, settings or ModelSettings())
    if kind in _CNNS + _VITS:
        return ModelInfo(full_spec, _revision(directory), frozenset({"features", "grid"}), encodes_text=False)
    if kind in _TEXT_ENCODERS:
        return ModelInfo(full_spec, _revision(directory), frozenset(), encodes_text=True)
    raise ValueError(
        f"cannot load model {spec!r}: its model_type is {kind!r}; known are, for images, {', '.join(_CNNS + _VITS)}, "
        f"and, for texts, {', '.join(_TEXT_ENCODERS)}"
    )


def load_image_model(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel:
    if hf_captioners.is_captioner(_read_json(_locate(spec)[0] / "config.json")):
        return hf_captioners.load_image_model(spec, settings, outputs)
    info = _describe_image_model(spec)
    preprocessing = read_preprocessing(_image_processor(_locate(spec)[0]))
    return BackboneImageModel(info, preprocessing, lambda: load_image_backbone(spec), settings, outputs)


def load_text_model(spec: str, settings: ModelSettings) -> BackboneTextModel:
    return BackboneTextModel(describe(spec), load_tokenizer(spec), lambda: load_text_backbone(spec), settings)


def load_image_backbone(spec: str) -> ImageBackbone:
    """Any vision `AutoModel` that gives `last_hidden_state`, [n, c, h, w] or [n, tokens, d].

    Raises:
        ValueError: The model is a text encoder, or its weights or image processor are missing or do not fit.
    """
    import torch

    _describe_image_model(spec)
    directory = _locate(spec)[0]
    processor = _image_processor(directory)
    scale, shift = _normalisation(processor)

    class HuggingFaceImageBackbone(torch.nn.Module):
        embedding_dim = 0
        scale: torch.Tensor
        shift: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.preprocessing = read_preprocessing(processor)
            self.net = _pretrained(directory)
            self.register_buffer("scale", torch.from_numpy(scale), persistent=False)
            self.register_buffer("shift", torch.from_numpy(shift), persistent=False)
            size = self.preprocessing.size
            with torch.no_grad():
                hidden, pooled = self._hidden(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            self.num_special_tokens = _num_special_tokens(self.net.config, size, hidden.shape[1])
            self.grid_dim = hidden.shape[2]
            self.feature_dim = self.grid_dim if pooled is None else pooled.shape[1]

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden, features = self._hidden(pixels)
            grid = hidden[:, self.num_special_tokens :]
            if features is None:
                features = hidden[:, 0] if self.num_special_tokens else grid.mean(1)
            return {"features": features, "grid": grid}

        def _hidden(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            """[n, special tokens + cells, d], and [n, feature_dim] of a model that pools for itself."""
            output = self.net(pixel_values=pixels.float() * self.scale + self.shift)
            hidden, pooled = output.last_hidden_state, output.get("pooler_output")
            cells = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
            return cells, None if pooled is None else pooled.flatten(1)

    return HuggingFaceImageBackbone().eval()


def load_text_backbone(spec: str) -> TextBackbone:
    """Any text `AutoModel` that gives `last_hidden_state`.

    Raises:
        ValueError: The weights are missing or do not fit.
    """
    import torch

    directory = _locate(spec)[0]

    class HuggingFaceTextBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _pretrained(directory)
            self.text_dim = self.net.config.hidden_size

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.net(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).float()
            return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)

    return HuggingFaceTextBackbone().eval()


def load_tokenizer(spec: str) -> Tokenizer:
    """The fast tokenizer beside a text encoder.

    Raises:
        ValueError: There is none.
    """
    import tokenizers

    directory = _locate(spec)[0]
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"the model in {str(directory)!r} has no tokenizer.json; save its fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    config = _read_json(directory / "config.json")
    pad_id = config.get("pad_token_id") or 0
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(_max_tokens(directory, config))
    tokenizer.enable_padding(pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id) or "[PAD]")
    return tokenizer_of(tokenizer)


def read_preprocessing(processor: Any) -> Preprocessing:
    """What an image processor of transformers does to the geometry of an image.

    Resizing is always bicubic here, whatever `resample` says; a stretch before a centre crop (DeiT's) becomes `cover`,
    which keeps the aspect ratio.

    Raises:
        ValueError: The processor makes no square of one size.
    """
    size = dict(processor.size)
    crop = dict(processor.crop_size) if processor.do_center_crop else {}
    resized, side = _square(size), _square(crop or size)
    if not processor.do_resize or resized is None or side is None:
        raise ValueError(
            f"{type(processor).__name__} with size {size} and crop_size {crop or None} does not resize every image to "
            "one square; give both sides of size, or of crop_size, the same length"
        )
    crop_fraction = getattr(processor, "crop_pct", None)
    stretched = (crop_fraction and side >= _STRETCHED_FROM) or "height" in size
    if not crop and stretched:
        return Preprocessing(side)
    return Preprocessing(side, "cover", min(1.0, (crop_fraction or 1.0) * side / resized))


def _square(size: Mapping[str, int]) -> int | None:
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return size["height"] if size.get("height") == size.get("width") and "height" in size else None


def _normalisation(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """`scale` and `shift`, float32[3, 1, 1], with pixels * scale + shift what the processor makes of pixels.

    They are found by asking it, since some rescale or normalise in ways of their own.

    Raises:
        ValueError: The processor does something else, such as flipping the channels.
    """
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    black, white, expected = processor(
        [np.zeros_like(noise), np.full_like(noise, 255), noise],
        do_resize=False, do_center_crop=False, input_data_format="channels_first", return_tensors="np",
    )["pixel_values"]  # fmt: skip
    shift = black[:, :1, :1]
    scale = (white[:, :1, :1] - shift) / 255
    if not np.allclose(noise * scale + shift, expected, atol=1e-4):
        raise ValueError(
            f"{type(processor).__name__} does more to the pixels than to rescale and normalise them, which is not "
            "supported; name another model"
        )
    return scale, shift


def _num_special_tokens(config: Any, size: int, num_tokens: int) -> int:
    """How many class and register tokens stand before the patches: none in CNNs and pyramids (Swin), which end with
    fewer places than patches."""
    patch_size = getattr(config, "patch_size", None)
    return max(0, num_tokens - (size // patch_size) ** 2) if patch_size else 0


def _describe_image_model(spec: str) -> ModelInfo:
    info = describe(spec)
    if "caption" in info.produces:
        raise ValueError(f"model {spec!r} is a captioner, whose image side stands not alone; name an image model")
    if not info.produces:
        raise ValueError(f"model {spec!r} is a text encoder and has no image side; name an image model for images")
    return info


def _image_processor(directory: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model in {str(directory)!r} has no image processor that can be read (preprocessor_config.json); save "
            "the one it was trained with there"
        ) from error


def _pretrained(directory: Path) -> Any:
    """The `AutoModel` in float32, without a pooler that was never trained.

    Raises:
        ValueError: The weights do not fit the configuration.
    """
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    net, loading = AutoModel.from_pretrained(
        directory, dtype=torch.float32, weights_only=True, trust_remote_code=False, output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    if any(name.startswith("pooler.") for name in missing):
        net.pooler = None  # a classifier's checkpoint has none, and transformers has made a random one
    if lacking := [name for name in missing if not name.startswith("pooler.")]:
        raise ValueError(f"the weights in {str(directory)!r} lack {', '.join(lacking[:3])}; save the whole model there")
    return net


def _max_tokens(directory: Path, config: Mapping[str, Any]) -> int:
    """The smallest of the limits that a model's files state."""
    positions = config.get("max_position_embeddings", 512)
    if config["model_type"] in _SHIFTED_POSITIONS:
        positions -= config.get("pad_token_id", 1) + 1
    limits = [positions]
    for name, key in (("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")):
        if (directory / name).is_file():
            limits.append(_read_json(directory / name).get(key) or positions)
    return int(min(limits))


def _locate(spec: str) -> tuple[Path, str]:
    """The directory of a model, and its spec: with the full path, so that it means the same from any directory."""
    argument = spec.removeprefix("hf:")
    path = Path(argument).expanduser().resolve()
    if argument and path.is_dir():
        return path, f"hf:{path}"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = argument.partition("@")
    try:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    except HFValidationError:  # no name that a repository could have
        cached = None
    if not isinstance(cached, str):
        raise ValueError(
            f"no model {spec!r}: {argument!r} is neither a directory nor a repository in the local Hugging Face cache; "
            "give the path of a model's directory, or fetch the repository first (hf download REPO)"
        )
    return Path(cached).parent, spec


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"no model in {str(path.parent)!r}: there is no {path.name}; save_pretrained writes one"
        ) from error
    except ValueError as error:
        raise ValueError(f"the model in {str(path.parent)!r} cannot be read: {path.name}: {error}") from error


def _revision(directory: Path) -> str:
    """12 hex digits that stand for the weights and the settings.

    Raises:
        ValueError: There are no weights.
    """
    weights = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not weights:
        raise ValueError(
            f"the model in {str(directory)!r} has no weights: there is no model.safetensors; save_pretrained writes one"
        )
    files = weights + [directory / name for name in _SETTINGS if (directory / name).is_file()]
    digests = [f"{path.name} {sha256_of(path)}" for path in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
