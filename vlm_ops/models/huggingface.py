"""`hf:PATH` or `hf:REPO[@REVISION]`: models in the format of transformers. What kind of model it is, `config.json` says:

* captioners, which write what they see (`hf_captioners`): `caption`;
* dual encoders, whose images and texts share a space (`hf_dual_encoders`): `embedding`, `features`, `grid`, and texts;
* image backbones (`hf_backbones`): `features`, `grid`;
* text encoders (`hf_backbones`): texts.

A model is a directory with `config.json` and its weights, one that `save_pretrained` has written, or a repository of the
Hugging Face hub. No code of a repository is run, unless `trust_remote_code` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_ops.models import ImageBackbone, ImageModel, ModelInfo, TextBackbone, Tokenizer, hf_captioners
from vlm_ops.models.backbones import BackboneImageModel, BackboneTextModel
from vlm_ops.models.hf_preprocessing import is_naflex, load_image_processor, read_preprocessing
from vlm_ops.models.hub import (
    check_code,
    check_tokenizer,
    fetch_repository,
    is_directory,
    locate,
    read_json,
    revision_of,
)
from vlm_ops.models.settings import CPU, ModelSettings

# The `model_type`s that are known to work as image backbones, and as text encoders.
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


def describe(spec: str, settings: ModelSettings = CPU) -> ModelInfo:
    """Reads `config.json`, and hashes the weights once a process.

    Raises:
        ValueError: There is no such model, or it is of an unknown type.
    """
    trusts = settings.trust_remote_code
    directory, full_spec = locate(spec, trusts)
    config = read_json(directory / "config.json")
    if hf_captioners.is_captioner(config):
        return hf_captioners.describe(full_spec, directory, settings)
    kind, model_type = _kind(spec, directory, settings)
    if kind is None:
        raise ValueError(
            f"cannot load model {spec!r}: its model_type is {model_type!r}; known are captioners (such as blip and qwen2_5_vl), "
            f"dual encoders (such as clip and siglip), the image backbones {', '.join(_CNNS + _VITS)} and the text encoders {', '.join(_TEXT_ENCODERS)}"
        )
    revision = revision_of(directory, trusts)
    if kind == "dual encoder":
        check_tokenizer(directory, trusts)
        # Code of a repository may give no tokens, and of images of many sizes there is no grid of one size.
        grid = () if _has_own_code(config) or model_type == "siglip2" else ("grid",)
        return ModelInfo(full_spec, revision, frozenset({"features", "embedding", *grid}))
    if kind == "image backbone":
        return ModelInfo(full_spec, revision, frozenset({"features", "grid"}), encodes_text=False)
    return ModelInfo(full_spec, revision, frozenset(), encodes_text=True)


def load_image_model(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel:
    info = describe(spec, settings)
    if "caption" in info.produces:
        return hf_captioners.load_image_model(info, locate(spec)[0], settings, outputs)
    _check_image_side(spec, info)
    towers, directory = _towers(spec, settings)
    processor = load_image_processor(directory, settings.trust_remote_code)
    if is_naflex(processor):
        from vlm_ops.models.hf_dual_encoders import NaFlexImageModel

        return NaFlexImageModel(info, processor, directory, settings, outputs)
    preprocessing = read_preprocessing(processor)
    return BackboneImageModel(info, preprocessing, lambda: towers.ImageTower(directory, settings), settings, outputs)


def load_text_model(spec: str, settings: ModelSettings) -> BackboneTextModel:
    info = describe(spec, settings)
    towers, directory = _towers(spec, settings)
    tokenize = towers.load_tokenizer(directory, settings)
    return BackboneTextModel(info, tokenize, lambda: towers.TextTower(directory, settings), settings)


def fetch(spec: str, directory: Path, settings: ModelSettings) -> str | None:
    if is_directory(spec):
        return None
    fetch_repository(spec, directory, settings.trust_remote_code)
    return f"hf:{directory.resolve()}"


def load_image_backbone(spec: str) -> ImageBackbone:
    """Raises:
    ValueError: The model has no image side, or its weights or image processor are missing or do not fit.
    """
    describe_image_model(spec, CPU)
    towers, directory = _towers(spec, CPU)
    return towers.ImageTower(directory, CPU)


def load_text_backbone(spec: str) -> TextBackbone:
    """Raises:
    ValueError: The weights are missing or do not fit.
    """
    towers, directory = _towers(spec, CPU)
    return towers.TextTower(directory, CPU)


def load_tokenizer(spec: str) -> Tokenizer:
    """Raises:
    ValueError: There is none.
    """
    towers, directory = _towers(spec, CPU)
    return towers.load_tokenizer(directory, CPU)


def _towers(spec: str, settings: ModelSettings) -> tuple[Any, Path]:
    """The module that has a model's image and text tower, and the model's directory."""
    directory, _ = locate(spec, settings.trust_remote_code)
    if _kind(spec, directory, settings)[0] == "dual encoder":
        from vlm_ops.models import hf_dual_encoders

        return hf_dual_encoders, directory
    from vlm_ops.models import hf_backbones

    return hf_backbones, directory


def describe_image_model(spec: str, settings: ModelSettings = CPU) -> ModelInfo:
    """Raises:
    ValueError: There is no such model, or it has no image side.
    """
    info = describe(spec, settings)
    if "caption" in info.produces:
        raise ValueError(f"model {spec!r} is a captioner, whose image side does not stand alone; name an image model")
    _check_image_side(spec, info)
    return info


def _check_image_side(spec: str, info: ModelInfo) -> None:
    if not info.produces:
        raise ValueError(f"model {spec!r} is a text encoder and has no image side; name an image model for images")


def _kind(spec: str, directory: Path, settings: ModelSettings) -> tuple[str | None, str]:
    """What kind of model a directory holds, and its `model_type`."""
    config = read_json(directory / "config.json")
    model_type = str(config.get("model_type"))
    if model_type in _CNNS + _VITS:
        return "image backbone", model_type
    if model_type in _TEXT_ENCODERS:
        return "text encoder", model_type
    model = _own_class(spec, directory, config, settings) if _has_own_code(config) else _model_class(model_type)
    is_dual = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    return "dual encoder" if is_dual else None, model_type


def _model_class(model_type: str) -> Any:
    """The class that `AutoModel` would give; None where transformers knows none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    name = MODEL_MAPPING_NAMES.get(model_type)
    return name and getattr(transformers, name if isinstance(name, str) else name[0])


def _has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether the code of a model lies in its repository, because transformers has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return config.get("model_type") not in MODEL_MAPPING_NAMES and "AutoModel" in config.get("auto_map", {})


def _own_class(spec: str, directory: Path, config: Mapping[str, Any], settings: ModelSettings) -> Any:
    check_code(spec, config, settings.trust_remote_code)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(config["auto_map"]["AutoModel"], directory)
