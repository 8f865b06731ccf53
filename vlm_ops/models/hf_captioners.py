"""`hf:PATH` or `hf:REPO[@REVISION]`: captioners in the format of transformers, and what each of them is told.

Whatever `AutoModelForImageTextToText` loads writes captions, in one of these ways:

    BLIP, GIT               go on from the words that they are given, if any
    ViT-GPT2, Pix2Struct    (the first a VisionEncoderDecoder) are told nothing
    Florence-2              is told a task: <CAPTION>, <DETAILED_CAPTION> or <MORE_DETAILED_CAPTION>
    BLIP-2, InstructBLIP,   are told a line of text, as their papers have it
      PaliGemma, Kosmos-2
    all others              (LLaVA, SmolVLM, Qwen-VL, InternVL, Gemma 3, ...) chat: they are asked about the image,
                            in the form of their own chat template

This module knows the files; `hf_caption_writing` has the models write.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_ops.models import ImageModel, ModelInfo
from vlm_ops.models.hub import check_code, read_json, revision_of
from vlm_ops.models.settings import ModelSettings

logger = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 40
_MAX_NEW_TOKENS_OF_CHAT = 64
# Ends of the names of the classes that write; `BlipForImageTextRetrieval` or `GitModel` do not.
_WRITERS = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForImageTextToText",
    "ForVision2Seq",
    "VisionEncoderDecoderModel",
)


@dataclass(frozen=True)
class Prompting:
    """How a model is told what to write.

    Attributes:
        way: `nothing`, `beginning` (of the caption), `task`, `line` or `chat`.
        default: What it is told unless the settings say otherwise.
        known: All that it can be told; empty: any text.
    """

    way: str
    default: str | None = None
    known: tuple[str, ...] = ()


_CHAT = Prompting("chat", "Describe this image in one plain sentence.")
# By `model_type`.
_PROMPTINGS = {
    "blip": Prompting("beginning"),
    "git": Prompting("beginning"),
    "vision-encoder-decoder": Prompting("nothing"),
    "pix2struct": Prompting("nothing"),
    # Xiao et al., "Florence-2", 2023; its further tasks give boxes, or read text.
    "florence2": Prompting("task", "<CAPTION>", ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")),
    "blip-2": Prompting("line"),
    # One of the instructions for captions in Dai et al., "InstructBLIP", 2023.
    "instructblip": Prompting("line", "A short image description:"),
    # Beyer et al., "PaliGemma", 2024: the prefix of captions in pretraining.
    "paligemma": Prompting("line", "caption en"),
    # Peng et al., "Kosmos-2", 2023.
    "kosmos-2": Prompting("line", "An image of"),
}


def is_captioner(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a model which writes about images."""
    sees = "vision_config" in config or config.get("model_type") == "vision-encoder-decoder"
    return sees and any(name.endswith(_WRITERS) for name in config.get("architectures") or ())


def describe(spec: str, directory: Path, settings: ModelSettings) -> ModelInfo:
    """Reads the small files, and hashes the weights once a process.

    Args:
        spec: The whole one.

    Raises:
        ValueError: Something of the model is missing, or it cannot be asked as the settings say.
    """
    config = read_json(directory / "config.json")
    _check_files(spec, directory, config, settings)
    _check_settings(spec, config, settings)
    takes = {"max_new_tokens", "num_beams"} | ({"caption_prompt"} if _prompting(config).way != "nothing" else set())
    revision = revision_of(directory, settings.trust_remote_code)
    return ModelInfo(spec, revision, frozenset({"caption"}), encodes_text=False, takes=frozenset(takes))


def load_image_model(info: ModelInfo, directory: Path, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel:
    """Reads the weights in the dtype of the settings.

    Raises:
        ValueError: The model cannot be loaded.
    """
    from vlm_ops.models.hf_caption_writing import HuggingFaceCaptioner

    config = read_json(directory / "config.json")
    prompting = _prompting(config)
    if settings.compile:
        logger.warning("--compile is left out for %s: its captions grow a token at a time", info.spec)
    return HuggingFaceCaptioner(
        info,
        directory,
        settings,
        kind=str(config.get("model_type")),
        way=prompting.way,
        prompt=settings.caption_prompt if settings.caption_prompt is not None else prompting.default,
        max_new_tokens=_MAX_NEW_TOKENS_OF_CHAT if prompting.way == "chat" else _MAX_NEW_TOKENS,
        writes="caption" in outputs,
    )


def _prompting(config: Mapping[str, Any]) -> Prompting:
    return _PROMPTINGS.get(str(config.get("model_type")), _CHAT)


def _check_files(spec: str, directory: Path, config: Mapping[str, Any], settings: ModelSettings) -> None:
    """Raises:
    ValueError: The model has no image processor, no form for a question, or code of its own that may not run.
    """
    kind = str(config.get("model_type"))
    if "auto_map" in config and kind == "florence2":
        raise ValueError(
            f"model {spec!r} is a Florence-2 in the format of its first repositories, which transformers cannot read; "
            "name its conversion, such as hf:florence-community/Florence-2-base"
        )
    if "auto_map" in config and kind not in _PROMPTINGS and not _is_built_in(kind):
        check_code(spec, config, settings.trust_remote_code)
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(
            f"the model in {str(directory)!r} has no processor (preprocessor_config.json or processor_config.json); "
            "save the one it was trained with there (AutoProcessor.from_pretrained(...).save_pretrained(...))"
        )
    if _prompting(config).way == "chat" and settings.caption_prompt is None and not _has_chat_template(directory):
        raise no_chat_template(directory)


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    files = (directory / name for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"))
    return any(path.is_file() and "chat_template" in read_json(path) for path in files)


def no_chat_template(directory: Path, image_token: str = "<image>") -> ValueError:
    return ValueError(
        f"the model in {str(directory)!r} has no chat template (chat_template.jinja), so how to ask it is unknown; add the "
        "one of its repository, or give the whole prompt with the image's place, such as --caption_prompt "
        f"'USER: {image_token} Describe this image. ASSISTANT:'"
    )


def _check_settings(spec: str, config: Mapping[str, Any], settings: ModelSettings) -> None:
    """Raises:
    ValueError: The model cannot be run, or told, what the settings say.
    """
    if settings.dtype == "int8":
        raise ValueError(f"--dtype int8 is for image and text towers; captioner {spec!r} writes in float32 or bfloat16")
    prompting, prompt = _prompting(config), settings.caption_prompt
    if prompt is not None and prompting.way == "nothing":
        raise ValueError(f"captioner {spec!r} cannot be told anything; leave out --caption_prompt {prompt!r}")
    if prompt is not None and not prompt.strip():
        raise ValueError("--caption_prompt is empty; leave it out for the model's usual one")
    if prompt is not None and prompting.known and prompt not in prompting.known:
        raise ValueError(
            f"captioner {spec!r} takes a task as --caption_prompt, not {prompt!r}; use {' or '.join(prompting.known)}"
        )
    positions = _num_positions(config)
    if settings.max_new_tokens is not None and positions is not None and settings.max_new_tokens >= positions:
        raise ValueError(
            f"--max_new_tokens {settings.max_new_tokens} does not fit captioner {spec!r}, which has {positions} positions"
        )


def _num_positions(config: Mapping[str, Any]) -> int | None:
    """Of the tokens that the language model can have before it, where its configuration says so."""
    of_text = config.get("text_config") or config.get("decoder") or config
    return next((of_text[name] for name in ("max_position_embeddings", "n_positions") if of_text.get(name)), None)


def _is_built_in(kind: str) -> bool:
    from transformers import CONFIG_MAPPING  # imported only for models of unknown types

    return kind in CONFIG_MAPPING
