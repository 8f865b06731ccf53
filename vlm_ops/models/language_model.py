"""Captioners on pretrained language models of transformers: the model reads an image by cross-attention.

What it reads are visual tokens, as a decoder reads its encoder (Vaswani et al., "Attention Is All You Need",
2017). `CrossAttentionWriter` makes them of a base model's outputs; `VisionEncoderDecoderWriter` brings its image
encoder with it (Li et al., "TrOCR", 2021, is such a pair). Both teach, search and score the same way.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    VisionEncoderDecoderModel,
)

from vlm_ops.models import hf_backbones, huggingface
from vlm_ops.models.captioner import Hypothesis
from vlm_ops.models.hf_preprocessing import load_image_processor, normalisation, read_preprocessing
from vlm_ops.models.hub import BROKEN_WEIGHTS, locate, quiet, read_json
from vlm_ops.models.standardised import Standardised
from vlm_ops.preprocessing import Preprocessing

TOKENIZER = "tokenizer"
_MAX_GRID = 64  # log1p of an outlier stays small, but infinities of a half-precision cache do not
_IGNORED = -100
# A search keeps the scores of all tokens at all its steps; at most 512 MB of them are kept at once.
_SCORES = 2**27


class _LanguageModelWriter(nn.Module):
    """What both writers share; a subclass says what its language model reads.

    A caption is a start sign, at most `max_tokens` tokens and an end sign. Many models have one sign for start, end
    and padding (GPT-2), so what is padding is never told by a token's number.

    Args:
        language_model: A causal one with cross-attention. Its own settings for generation are dropped.
        start_id: None for the tokenizer's first sign of `bos`, `cls`, `eos`.

    Raises:
        ValueError: Tokenizer and model do not fit, or the model has no room for captions that long.
    """

    def __init__(self, language_model: Any, tokenizer: Any, start_id: int | None, max_tokens: int) -> None:
        super().__init__()
        end_id = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
        if end_id is None:
            raise ValueError("the tokenizer has no eos_token, so no caption would end; save it with one")
        self.start_id = _first(start_id, tokenizer.bos_token_id, tokenizer.cls_token_id, end_id)
        self.end_id = end_id
        self.max_tokens = max_tokens
        self.language_model = language_model
        self.tokenizer = tokenizer
        config = language_model.config
        largest_id = max(tokenizer.vocab_size - 1, self.start_id, self.end_id)
        if largest_id >= config.vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {largest_id}, but the language model knows {config.vocab_size} tokens; "
                "name the tokenizer's own model, or resize its embeddings (resize_token_embeddings)"
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and max_tokens + 2 > positions:
            raise ValueError(
                f"captions of {max_tokens} tokens do not fit the {positions} positions of the language model; "
                f"set max_tokens to at most {positions - 2}"
            )
        language_model.generation_config = GenerationConfig()
        # A checkpoint whose two matrices differ is not tied, whatever its configuration says.
        head = language_model.get_output_embeddings()
        config.tie_word_embeddings = head is not None and head.weight is language_model.get_input_embeddings().weight
        self.register_state_dict_post_hook(_leave_out_tied)
        self.register_load_state_dict_pre_hook(_put_back_tied)

    def memory(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The visual tokens of n images: float32[n, m, width], of the width that the cross-attention reads."""
        raise NotImplementedError

    def loss(
        self, inputs: Mapping[str, torch.Tensor], captions: Sequence[Sequence[str]], label_smoothing: float
    ) -> torch.Tensor:
        """Mean cross-entropy of the captions' tokens and end signs; every image has as many captions."""
        memory = self.memory(inputs)
        ids, real = (each.to(memory.device) for each in self.encode([text for texts in captions for text in texts]))
        output = self.language_model(
            input_ids=ids[:, :-1],
            attention_mask=real[:, :-1].long(),
            encoder_hidden_states=memory.repeat_interleave(len(captions[0]), dim=0),
            use_cache=False,
        )
        targets = ids[:, 1:].masked_fill(~real[:, 1:], _IGNORED)
        return F.cross_entropy(
            output.logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, label_smoothing=label_smoothing
        )

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of n captions with start and end, int64[n, t], and which of them are not padding, bool[n, t]."""
        tokens = self.tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"]
        rows = [[self.start_id, *row[: self.max_tokens], self.end_id] for row in tokens]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.end_id] * (longest - len(row)) for row in rows])
        return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])

    @torch.inference_mode()
    def write(
        self, inputs: Mapping[str, torch.Tensor], num_beams: int = 5, num_wanted: int | None = None
    ) -> list[list[Hypothesis]]:
        """The sentences that a beam search finds for each image, best first, `num_wanted` of them or one a beam. One beam is
        greedy decoding.

        Returns:
            Hypotheses whose `log_prob` is the mean over the tokens and the end sign, by which the search ranks them.
        """
        if not len(next(iter(inputs.values()))):
            return []
        numbers = (self.max_tokens + 1) * self.language_model.config.vocab_size * num_beams  # of an image
        at_once = self.memory(inputs).split(max(1, _SCORES // numbers))
        return [hypotheses[:num_wanted] for memory in at_once for hypotheses in self._search(memory, num_beams)]

    def _search(self, memory: torch.Tensor, num_beams: int) -> list[list[Hypothesis]]:
        start = torch.full((len(memory), 1), self.start_id, device=memory.device)
        output = self.language_model.generate(
            start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=memory,
            # Of its own, `generate` makes a cache without room for the memory, which some models (BERT) cannot take.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            generation_config=GenerationConfig(
                num_beams=num_beams,
                num_return_sequences=num_beams,
                max_new_tokens=self.max_tokens + 1,
                bos_token_id=self.start_id,
                eos_token_id=self.end_id,
                pad_token_id=self.end_id,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
        ids = output.sequences[:, 1:]
        log_probs = output.sequences_scores if num_beams > 1 else self._log_probs(ids, output.scores)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        written = [Hypothesis(text.strip(), each) for text, each in zip(texts, log_probs.tolist(), strict=True)]
        return [written[row : row + num_beams] for row in range(0, len(written), num_beams)]

    def _log_probs(self, ids: torch.Tensor, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean log-probability of tokens int64[n, t] up to their first end sign, by the scores float32[n, vocabulary]
        of each of t steps: float32[n]."""
        losses = [F.cross_entropy(step, ids[:, i], reduction="none") for i, step in enumerate(scores)]
        is_end = ids == self.end_id
        real = is_end.cumsum(1) - is_end.long() == 0
        return -(torch.stack(losses, dim=1) * real).sum(1) / real.sum(1)


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Shapes of what a `CrossAttentionWriter` reads.

    Attributes:
        feature_dim, grid_dim, embedding_dim: Of the base model's outputs; `embedding_dim` may be 0.
        num_cells: Of the grid.
        max_tokens: Of the longest sentence.
    """

    feature_dim: int
    grid_dim: int
    embedding_dim: int
    num_cells: int
    max_tokens: int = 30


class CrossAttentionWriter(Standardised, _LanguageModelWriter):
    """A language model that reads what a base model makes of images: each cell of the grid, the pooled features and
    the embedding become a visual token.

    Inputs of n images: `features` float32[n, feature_dim], `grid` float[n, num_cells, grid_dim] and, where
    `embedding_dim` is not 0, `embedding` float32[n, embedding_dim].

    Args:
        language_model, tokenizer: As `load_language_model` gives them.

    Raises:
        ValueError: See above, or the language model was made without cross-attention.
    """

    def __init__(self, config: CrossAttentionConfig, language_model: Any, tokenizer: Any) -> None:
        if not getattr(language_model.config, "add_cross_attention", False):
            raise ValueError(
                f"{type(language_model).__name__} was made without cross-attention and cannot read images; load it by "
                "load_language_model, or set add_cross_attention in its configuration"
            )
        super().__init__(config.feature_dim, language_model, tokenizer, None, config.max_tokens)
        self.config = config
        width = language_model.config.hidden_size
        self.from_grid = nn.Linear(config.grid_dim, width)
        self.cell_position = nn.Parameter(torch.randn(config.num_cells, width) * 0.02)
        self.from_features = nn.Linear(config.feature_dim, width)
        self.from_embedding = nn.Linear(config.embedding_dim, width) if config.embedding_dim else None
        self.memory_norm = nn.LayerNorm(width)

    def memory(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32[n, num_cells + 1 or 2, width]."""
        grid = inputs["grid"].float()  # of a CNN not negative, of a transformer of either sign
        grid = self.from_grid(grid.sign() * torch.log1p(grid.abs().clamp(max=_MAX_GRID)))
        tokens = [grid + self.cell_position, self.from_features(self.standardised(inputs["features"]))[:, None]]
        if self.from_embedding is not None:
            scale = self.config.embedding_dim**0.5  # the embedding has norm 1; this gives each number size 1
            tokens.append(self.from_embedding(scale * inputs["embedding"])[:, None])
        return self.memory_norm(torch.cat(tokens, dim=1))


class VisionEncoderDecoderWriter(_LanguageModelWriter):
    """An image encoder and a language model that reads its tokens. Its input is `pixels` uint8[n, 3, size, size].

    Args:
        model: Its parts go over into the writer.
        mean, std: Three numbers each: the encoder's input is (pixels - mean) / std, of pixels in [0, 255].
        max_tokens: Of the longest sentence.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        model: VisionEncoderDecoderModel,
        tokenizer: Any,
        preprocessing: Preprocessing,
        mean: Sequence[float],
        std: Sequence[float],
        max_tokens: int = 30,
    ) -> None:
        super().__init__(model.decoder, tokenizer, model.generation_config.decoder_start_token_id, max_tokens)
        self.preprocessing = preprocessing
        self.image_encoder = model.encoder
        if getattr(self.image_encoder, "pooler", None) is not None:
            self.image_encoder.pooler = None  # nothing reads what it gives
        self.projection = getattr(model, "enc_to_dec_proj", None) or nn.Identity()
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def memory(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32[n, tokens of the encoder, width]."""
        pixels = (inputs["pixels"].float() - self.pixel_mean) / self.pixel_std
        return self.projection(self.image_encoder(pixel_values=pixels).last_hidden_state)


def load_language_model(spec: str) -> tuple[Any, Any]:
    """A causal language model with cross-attention, and its tokenizer.

    Args:
        spec: `hf:PATH` or `hf:REPO[@REVISION]`, as the image models.

    Raises:
        ValueError: There is no such model here, it cannot be given cross-attention, or something of it is missing.
    """
    directory = _directory(spec)
    config = _configuration(directory)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None or "encoder_hidden_states" not in inspect.signature(architecture.forward).parameters:
        raise ValueError(
            f"model {spec!r} cannot read images: a {config.model_type!r} is no causal language model with "
            "cross-attention; name one that is, such as a GPT-2"
        )
    config.is_decoder = config.add_cross_attention = True
    tokenizer = _tokenizer(directory)
    # A model that was trained on text alone has no such weights: they are new, and random.
    return _pretrained(architecture, directory, config, may_lack=("cross", "encoder_attn")), tokenizer


def load_vision_encoder_decoder(
    spec: str, language_model_spec: str | None = None, max_tokens: int = 30
) -> VisionEncoderDecoderWriter:
    """A writer that sees for itself.

    Args:
        spec: A VisionEncoderDecoder with image processor and tokenizer; or, with `language_model_spec`, a vision
            transformer with its image processor, on which that language model is then set.
        max_tokens: Of the longest sentence.

    Raises:
        ValueError: See `load_language_model`; or the encoder gives no tokens, or takes other images than its image
            processor makes.
    """
    directory = _directory(spec)
    kind = _configuration(directory).model_type
    if (kind == "vision-encoder-decoder") == (language_model_spec is not None):
        remedy = (
            "it has a language model already; leave out" if language_model_spec else "name a language model, such as"
        )
        raise ValueError(f"model {spec!r} is a {kind!r}: {remedy} {language_model_spec or 'hf:gpt2'!r}")
    if language_model_spec is None:
        config = _configuration(directory)
        model = _pretrained(VisionEncoderDecoderModel, directory, config, may_lack=("encoder.pooler.",))
        tokenizer = _tokenizer(directory)
    else:
        huggingface.describe_image_model(spec)
        encoder = hf_backbones.pretrained(directory)
        if not hasattr(encoder.config, "hidden_size"):
            raise ValueError(f"model {spec!r} is a {kind!r}, which gives no tokens; name a vision transformer")
        language_model, tokenizer = load_language_model(language_model_spec)
        model = _joined(encoder, language_model)
    processor = load_image_processor(directory)
    scale, shift = normalisation(processor)
    writer = VisionEncoderDecoderWriter(
        model,
        tokenizer,
        read_preprocessing(processor),
        mean=(-shift / scale).ravel().tolist(),
        std=(1 / scale).ravel().tolist(),
        max_tokens=max_tokens,
    )
    size = writer.preprocessing.size
    with torch.no_grad():  # images that do not fit fail here, not in the first batch
        writer.eval().memory({"pixels": torch.zeros(1, 3, size, size, dtype=torch.uint8)})
    return writer


def describe_writer(writer: CrossAttentionWriter | VisionEncoderDecoderWriter) -> dict[str, Any]:
    """All that `writer_from` needs besides the tokenizer and the weights, as JSON."""
    language_model = _as_json(writer.language_model.config)
    if isinstance(writer, CrossAttentionWriter):
        return {"kind": "cross-attention", "shapes": asdict(writer.config), "language_model": language_model}
    return {
        "kind": "vision-encoder-decoder",
        "image_encoder": _as_json(writer.image_encoder.config),
        "language_model": language_model,
        "start_id": writer.start_id,
        "max_tokens": writer.max_tokens,
        "preprocessing": asdict(writer.preprocessing),
        "mean": writer.pixel_mean.flatten().tolist(),
        "std": writer.pixel_std.flatten().tolist(),
    }


def save_tokenizer(writer: CrossAttentionWriter | VisionEncoderDecoderWriter, path: Path) -> None:
    """Writes the tokenizer's files into `path / TOKENIZER`."""
    writer.tokenizer.save_pretrained(path / TOKENIZER)


def writer_from(description: Mapping[str, Any], path: Path) -> CrossAttentionWriter | VisionEncoderDecoderWriter:
    """The writer that was described, with random weights: `load_state_dict` brings its own.

    Args:
        path: Where `save_tokenizer` has written.

    Raises:
        ValueError: The description is of another kind of writer, or the tokenizer is missing.
    """
    if description.get("kind") not in ("cross-attention", "vision-encoder-decoder"):
        raise ValueError(
            f"unknown kind of writer {description.get('kind')!r}; known are 'cross-attention' and "
            "'vision-encoder-decoder'"
        )
    tokenizer = _tokenizer(path / TOKENIZER)
    language_model = AutoModelForCausalLM.from_config(_from_json(description["language_model"]))
    if description["kind"] == "cross-attention":
        return CrossAttentionWriter(CrossAttentionConfig(**description["shapes"]), language_model, tokenizer)
    model = _joined(AutoModel.from_config(_from_json(description["image_encoder"])), language_model)
    model.generation_config.decoder_start_token_id = description["start_id"]
    return VisionEncoderDecoderWriter(
        model,
        tokenizer,
        Preprocessing(**description["preprocessing"]),
        description["mean"],
        description["std"],
        description["max_tokens"],
    )


def _joined(encoder: Any, language_model: Any) -> VisionEncoderDecoderModel:
    # Not from_encoder_decoder_pretrained: in transformers 5.23 it asks GPT2Config for an attribute it has lost.
    with quiet():
        return VisionEncoderDecoderModel(encoder=encoder, decoder=language_model)


def _leave_out_tied(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Of a tensor that has several names, keeps the first: safetensors takes no shared memory."""
    for name in _tied(module):
        del state[prefix + name]


def _put_back_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _tied(module).items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]


def _tied(module: nn.Module) -> dict[str, str]:
    """Further names of parameters -> their first name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}
    return {name: known for name, known in names.items() if name != known}


def _as_json(config: Any) -> dict[str, Any]:
    """A configuration of transformers without the path that it was loaded from."""
    return {name: value for name, value in json.loads(config.to_json_string(False)).items() if name != "_name_or_path"}


def _from_json(config: Mapping[str, Any]) -> Any:
    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


def _directory(spec: str) -> Path:
    if not spec.startswith("hf:"):
        raise ValueError(f"model {spec!r} is no model of transformers; use hf:PATH or hf:REPO[@REVISION]")
    return locate(spec)[0]


def _configuration(directory: Path) -> Any:
    read_json(directory / "config.json")  # its errors say what to do
    return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def _pretrained(architecture: Any, directory: Path, config: Any, may_lack: Sequence[str]) -> Any:
    """A model in float32 whose weights lack at most those with such a part in their name."""
    try:
        with quiet():
            model, loading = architecture.from_pretrained(
                directory, config=config, dtype=torch.float32, weights_only=True, output_loading_info=True
            )
    except BROKEN_WEIGHTS as error:
        raise ValueError(
            f"the model in {str(directory)!r} has no weights that can be read (model.safetensors); save_pretrained "
            "writes them"
        ) from error
    missing = sorted(name for name in loading["missing_keys"] if not any(part in name for part in may_lack))
    if missing:
        raise ValueError(f"the weights in {str(directory)!r} lack {', '.join(missing[:3])}; save the whole model there")
    return model


def _tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise ValueError(
            f"there is no tokenizer in {str(directory)!r} (tokenizer.json); save the model's own there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _first(*ids: int | None) -> Any:
    return next((each for each in ids if each is not None), None)
