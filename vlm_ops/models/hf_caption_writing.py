"""A captioner of transformers, writing: images in, sentences out, as its own processor and `generate` have it.

Where a model's processor makes one square of every image, images come as such squares, decoded and resized as for any
other model, and are normalised on the device. Where it cuts them into tiles or keeps their shape, they come in their own
aspect ratio and go through the processor.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
)

from vlm_ops.images import preprocess
from vlm_ops.models import Caption, ImageEncoding, ModelInfo
from vlm_ops.models.hf_captioners import no_chat_template
from vlm_ops.models.hf_preprocessing import normalisation, read_preprocessing
from vlm_ops.models.hub import BROKEN_WEIGHTS, check_tokenizer, quiet, why_unreadable
from vlm_ops.models.settings import ModelSettings
from vlm_ops.preprocessing import Preprocessing

# The part of a model that writes, where its own `generate` only hands over to that one's.
_WRITING_PARTS = {"blip": "text_decoder", "blip-2": "language_model", "instructblip": "language_model", "kosmos-2": "text_model"}  # fmt: skip
# Missing without loss: no captioner reads the pooled token of its image encoder.
_MAY_LACK = ("pooler.",)
# Sampling, which a model's own settings may ask for; the values are those of no sampling.
_NO_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "min_p": None}
# The longer side of an image whose shape is kept. Tiles and native resolutions are for reading documents; for one
# sentence, 1024 pixels (1,300 tokens of a Qwen-VL) tell as much, at a quarter of the cost of 2048.
_LONGER_SIDE = 1024
# On a CPU at once, where larger batches gain nothing (BLIP-base: 0.49 images/s of a core alone, 0.52 by four, 0.53 by
# sixteen) but need memory: an image may have 17 tiles, and a beam search keeps the scores of all tokens.
_CPU_BATCH = 4


class HuggingFaceCaptioner:
    """An `ImageModel` that gives captions. Their score is the geometric mean of their tokens' probabilities.

    Captions are greedy, or of a beam search, by the model's own settings for generation but for sampling.

    Args:
        kind: The `model_type`.
        way: As `hf_captioners.Prompting` has it.
        prompt: What the model is told; None: nothing.
        max_new_tokens: Unless the settings or the model's own say otherwise.
        writes: Whether to load the weights; without, it is wanted for its preprocessing alone.

    Raises:
        ValueError: The processor or the weights cannot be loaded, or a chat model has no form for the question.
    """

    label_names: Sequence[str] = ()

    def __init__(
        self,
        info: ModelInfo,
        directory: Path,
        settings: ModelSettings,
        *,
        kind: str,
        way: str,
        prompt: str | None,
        max_new_tokens: int,
        writes: bool = True,
    ) -> None:
        self.info = info
        self._device = settings.device
        self._dtype = getattr(torch, settings.dtype)
        with quiet():
            processor = _load_processor(directory, kind, settings.trust_remote_code)
            self._asked = _Asked(processor, kind, way, prompt, directory)
            self._squares = _squares_of(self._asked)
        self.preprocessing = (
            Preprocessing(_LONGER_SIDE, "contain") if self._squares is None else self._squares.preprocessing
        )
        self._own = threading.local()
        # One batch at a time on a GPU: other threads decode meanwhile. On a CPU each thread uses its own core.
        self._lock = None if settings.is_cpu else threading.Lock()
        if writes:
            with quiet():
                self._model = _load_model(directory, self._dtype, settings.trust_remote_code)
                self._model.eval().requires_grad_(False).to(self._device)
            # Of how it generates, all is set on purpose.
            logging.getLogger("transformers.generation.utils").setLevel(logging.ERROR)
            self._end_ids = _set_generation(self._model, settings, max_new_tokens)

    def encode_images(self, pixels: Any) -> ImageEncoding:
        """Captions of uint8[n, 3, size, size], or of a list of n uint8[3, h, w]; n may be 0."""
        if not hasattr(self, "_model"):
            return ImageEncoding()
        started = time.perf_counter()
        at_once = _CPU_BATCH if self._lock is None else max(1, len(pixels))
        parts = (pixels[start : start + at_once] for start in range(0, len(pixels), at_once))
        captions = [caption for part in parts for caption in self._captions(part)]
        return ImageEncoding(captions=captions, caption_sec=time.perf_counter() - started)

    @torch.inference_mode()
    def _captions(self, pixels: Any) -> list[Caption]:
        asked = self._of_this_thread("asked", self._asked, ())
        if self._squares is not None:
            inputs = self._squares.inputs(pixels, self._device)
        else:
            inputs = asked.inputs([torch.from_numpy(np.ascontiguousarray(each)) for each in pixels])
        inputs = {name: self._placed(value) for name, value in inputs.items()}
        if self._lock is None:
            weights = itertools.chain(self._model.parameters(), self._model.buffers())
            own_model = self._of_this_thread("model", self._model, weights)
            ids, log_probs = _written(own_model, inputs, self._end_ids)
        else:
            with self._lock:
                ids, log_probs = _written(self._model, inputs, self._end_ids)
        scores = log_probs.clamp(max=0).exp().tolist()
        return [Caption(text, "generated", score) for text, score in zip(asked.texts(ids), scores, strict=True)]

    def _placed(self, value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        if self._device != "cpu" and not value.is_cuda:
            value = value.pin_memory()
        return value.to(self._device, self._dtype if value.is_floating_point() else None, non_blocking=True)

    def _of_this_thread(self, name: str, original: Any, shared: Any) -> Any:
        """This thread's own copy, that shares the tensors: models (a Qwen-VL its positions) and tokenizers (how they pad)
        keep what belongs to a call."""
        if not hasattr(self._own, name):
            setattr(self._own, name, copy.deepcopy(original, {id(tensor): tensor for tensor in shared}))
        return getattr(self._own, name)


class _Asked:
    """A processor and what it tells its model beside the images."""

    def __init__(self, processor: Any, kind: str, way: str, prompt: str | None, directory: Path) -> None:
        self.processor = processor
        self._kind, self._way = kind, way
        self._text = _text(processor, kind, way, prompt, directory)
        # Many chat templates put the start sign themselves, and tokenizers would put a second one.
        start = processor.tokenizer.bos_token
        self._has_start = way == "chat" and bool(start) and str(self._text).startswith(start)

    def inputs(self, images: Sequence[torch.Tensor]) -> dict[str, Any]:
        """What `generate` takes of n images uint8[3, h, w]."""
        options: dict[str, Any] = {"input_data_format": "channels_first", "return_tensors": "pt"}
        if self._text is not None:
            options |= {"text": [self._text] * len(images), "padding": True}
            if self._has_start:
                options["add_special_tokens"] = False
        # Chat models may be shown several images in one question, so theirs are lists.
        shown = [[image] for image in images] if self._way == "chat" else list(images)
        inputs = dict(self.processor(images=shown, **options))
        inputs.pop("labels", None)  # PaliGemma's processor makes them whether or not it is trained
        if self._kind == "git" and self._text is not None:
            # Behind an end sign GIT would begin anew. (BLIP takes it away by itself.)
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
            inputs.pop("token_type_ids", None)
        return inputs

    def texts(self, ids: torch.Tensor) -> list[str]:
        """Captions of tokens int64[n, t]: in one line, without special tokens."""
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        if self._kind == "kosmos-2":  # marks phrases, and tells where they are
            texts = [re.sub("<.*?>", "", text) for text in texts]
        return [" ".join(text.split()) for text in texts]


def _text(processor: Any, kind: str, way: str, prompt: str | None, directory: Path) -> str | None:
    """What a processor takes as text for each image.

    Raises:
        ValueError: A chat model's files have no chat template, and the prompt does not say where the image goes.
    """
    image_token = getattr(processor, "image_token", None)
    image_token = getattr(image_token, "content", image_token)
    if kind == "paligemma":
        return f"{image_token}{prompt}"
    if way != "chat":
        return prompt
    assert prompt is not None
    if image_token and image_token in prompt:  # in the model's own form already
        return prompt
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    try:
        # Models that think aloud (Qwen3.5) are asked not to; templates of others ignore it.
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    except (ValueError, AttributeError) as error:
        raise no_chat_template(directory, image_token or "<image>") from error


@dataclass(frozen=True)
class _Squares:
    """A processor that makes one square of every image, as data.

    Attributes:
        scale, shift: float32[3, 1, 1]: the model's input is pixels * scale + shift.
        others: What `generate` takes of one image besides its pixels.
    """

    preprocessing: Preprocessing
    scale: torch.Tensor
    shift: torch.Tensor
    others: Mapping[str, Any]

    def inputs(self, pixels: np.ndarray, device: str) -> dict[str, Any]:
        """What `generate` takes of uint8[n, 3, size, size]."""
        on_device = torch.from_numpy(np.ascontiguousarray(pixels))
        if device != "cpu":
            on_device = on_device.pin_memory().to(device, non_blocking=True)
        values = on_device.float() * self.scale.to(device) + self.shift.to(device)
        repeated = {name: torch.cat([value] * len(pixels)) for name, value in self.others.items()}
        return {**repeated, "pixel_values": values}


def _squares_of(asked: _Asked) -> _Squares | None:
    """None where the processor does not make one square of every image, or makes it as `preprocess` cannot."""
    try:
        preprocessing = read_preprocessing(asked.processor.image_processor)
        scale, shift = map(torch.from_numpy, normalisation(asked.processor.image_processor))
    except (ValueError, AttributeError, KeyError, TypeError):  # they tell their sizes in many ways
        return None
    wide = torch.arange(256, dtype=torch.uint8).repeat(3, preprocessing.size, 1)
    made = [asked.inputs([image]) for image in (wide, wide.transpose(1, 2))]
    for image, inputs in zip((wide, wide.transpose(1, 2)), made, strict=True):
        values, expected = inputs.pop("pixel_values", None), preprocess(image, preprocessing) * scale + shift
        # Whole processors may cut into tiles what their image processors do not.
        if np.shape(values) != (1, *expected.shape) or bool(((values[0] - expected).abs() > 1.01 * scale).any()):
            return None
    others, again = made
    # What is told of an image's shape is not the same of both.
    if not all(torch.is_tensor(value) and torch.equal(value, again[name]) for name, value in others.items()):
        return None
    return _Squares(preprocessing, scale, shift, others)


class _TwoProcessors:
    """What a model has whose processors were never made one."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: Any, **options: Any) -> Any:
        return self.image_processor(images, **options)


def _load_processor(directory: Path, kind: str, trust_remote_code: bool) -> Any:
    load = {"trust_remote_code": trust_remote_code}
    check_tokenizer(directory, trust_remote_code)
    try:
        if kind == "vision-encoder-decoder":
            processor: Any = _TwoProcessors(
                AutoImageProcessor.from_pretrained(directory, **load), AutoTokenizer.from_pretrained(directory, **load)
            )
        else:
            processor = AutoProcessor.from_pretrained(directory, **load)
    except ImportError as error:  # SmolVLM's needs num2words
        raise ValueError(f"the processor in {str(directory)!r} cannot be loaded: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_processor(directory, _first_line(error)) from error
    for part in ("image_processor", "tokenizer"):
        if not hasattr(processor, part):  # AutoProcessor has found the other one only
            raise _bad_processor(directory, f"there is no {part.replace('_', ' ')}")
    processor.tokenizer.padding_side = "left"  # new tokens go to the right
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _bad_processor(directory: Path, reason: str) -> ValueError:
    return ValueError(
        f"the model in {str(directory)!r} has no processor that can be read: {reason}; save the one it was trained with "
        "there (AutoProcessor.from_pretrained(...).save_pretrained(...))"
    )


def _load_model(directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, weights_only=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except ImportError as error:
        raise ValueError(f"captioner {str(directory)!r} cannot be loaded: {_first_line(error)}") from error
    except BROKEN_WEIGHTS as error:
        raise ValueError(
            f"captioner {str(directory)!r} cannot be loaded: {why_unreadable(error)}; copy or fetch the whole model anew"
        ) from error
    model, loading = loaded
    missing = sorted(name for name in loading["missing_keys"] if not any(part in name for part in _MAY_LACK))
    if missing:
        raise ValueError(f"the weights in {str(directory)!r} lack {', '.join(missing[:3])}; save the whole model there")
    return model


def _set_generation(model: Any, settings: ModelSettings, max_new_tokens: int) -> list[int]:
    """Sets how the model writes from now on, and gives the ids of its end signs."""
    kind = model.config.model_type
    own = getattr(model, _WRITING_PARTS[kind]).generation_config if kind in _WRITING_PARTS else model.generation_config
    if kind == "blip":  # which passes it on by itself
        own.eos_token_id = model.config.text_config.sep_token_id
    own.update(
        **_NO_SAMPLING,
        max_length=None,
        max_new_tokens=settings.max_new_tokens or own.max_new_tokens or max_new_tokens,
        num_return_sequences=1,
        num_beams=settings.num_beams or own.num_beams or 1,
        return_dict_in_generate=True,
    )
    own.output_scores = own.num_beams > 1
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    end_ids = [id_ for id_ in ends if id_ is not None]
    if own.pad_token_id is None and end_ids:
        own.pad_token_id = end_ids[0]
    return end_ids


def _written(model: Any, inputs: Mapping[str, Any], end_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens int64[n, t], and the mean log-probability of each row's up to its end sign, float32[n]; on the CPU.

    Log-probabilities are of the scores that tokens were chosen by, as `compute_transition_scores` has them.
    """
    likeliest = _Likeliest()
    output = model.generate(**inputs, logits_processor=LogitsProcessorList([likeliest]))
    beams = getattr(output, "beam_indices", None)
    if beams is None:
        log_probs = torch.stack(likeliest.log_probs, dim=1)
        ids = output.sequences[:, -log_probs.shape[1] :]
        is_end = torch.isin(ids, torch.tensor(end_ids, device=ids.device, dtype=ids.dtype))
        is_real = is_end.cumsum(1) - is_end.long() == 0
    else:
        is_real, rows = beams >= 0, beams.clamp(min=0).long()
        ids = output.sequences[:, -beams.shape[1] :]
        steps = zip(output.scores, rows.T, ids.T, strict=False)  # the search may have gone on behind the best
        log_probs = torch.stack([scores[row, chosen] for scores, row, chosen in steps], dim=1)
    total = log_probs.masked_fill(~is_real, 0).sum(1)
    return ids.cpu(), (total / is_real.sum(1).clamp(min=1)).cpu()


class _Likeliest(LogitsProcessor):
    """Keeps the log-probability of each step's likeliest token, float32[n], which is the one that greedy decoding takes.
    The scores of all tokens (Qwen-VL: 39 MB a caption) need not be kept then."""

    def __init__(self) -> None:
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.log_probs.append(scores.float().log_softmax(-1).amax(-1))
        return scores


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
