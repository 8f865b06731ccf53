"""`hf:` image backbones and text encoders: what an `AutoModel` gives of images, or of texts.

Images: `features` are what the model pools (its class token, or the mean of its feature map), `grid` its
feature map or patch tokens. Texts: the mean of the last hidden states over the tokens, as sentence-transformers
pools (Reimers & Gurevych, "Sentence-BERT", EMNLP 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.models import Tokenizer
from vlm_ops.models.backbones import tokenizer_of
from vlm_ops.models.hf_preprocessing import load_image_processor, normalisation, read_preprocessing
from vlm_ops.models.hub import BROKEN_WEIGHTS, quiet, read_json, why_unreadable
from vlm_ops.models.settings import CPU, ModelSettings

# Their positions are numbered from behind the padding id, so that the first of them are never used.
_SHIFTED_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")


class Normalised(nn.Module):
    """What the image towers share: pixels uint8[n, 3, size, size] to what an image processor makes of them.

    Raises:
        ValueError: There is no image processor beside the model, or one that cannot be followed.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, directory: Path, settings: ModelSettings = CPU) -> None:
        super().__init__()
        processor = load_image_processor(directory, settings.trust_remote_code)
        self.preprocessing = read_preprocessing(processor)
        scale, shift = normalisation(processor)
        self.register_buffer("scale", torch.from_numpy(scale), persistent=False)
        self.register_buffer("shift", torch.from_numpy(shift), persistent=False)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float() * self.scale + self.shift

    def blank(self) -> torch.Tensor:
        """One black image."""
        return torch.zeros(1, 3, self.preprocessing.size, self.preprocessing.size, dtype=torch.uint8)


class ImageTower(Normalised):
    """Any vision `AutoModel` that gives `last_hidden_state`, [n, c, h, w] or [n, tokens, d].

    Raises:
        ValueError: The weights or the image processor are missing or do not fit.
    """

    embedding_dim = 0

    def __init__(self, directory: Path, settings: ModelSettings = CPU) -> None:
        super().__init__(directory, settings)
        self.net = pretrained(directory, settings)
        with torch.no_grad():
            hidden, pooled = self._hidden(self.blank())
        self.num_special_tokens = num_special_tokens(self.net.config, self.preprocessing.size, hidden.shape[1])
        self.grid_dim = hidden.shape[2]
        self.feature_dim = self.grid_dim if pooled is None else pooled.shape[1]
        self.eval()

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, features = self._hidden(pixels)
        grid = hidden[:, self.num_special_tokens :]
        if features is None:
            features = hidden[:, 0] if self.num_special_tokens else grid.mean(1)
        return {"features": features, "grid": grid}

    def _hidden(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[n, special tokens + cells, d], and [n, feature_dim] of a model that pools for itself."""
        output = self.net(pixel_values=self.normalised(pixels))
        pooled = output.get("pooler_output")
        return cells(output.last_hidden_state), None if pooled is None else pooled.flatten(1)


class TextTower(nn.Module):
    """Any text `AutoModel` that gives `last_hidden_state`.

    Raises:
        ValueError: The weights are missing or do not fit.
    """

    def __init__(self, directory: Path, settings: ModelSettings = CPU) -> None:
        super().__init__()
        self.net = pretrained(directory, settings)
        self.text_dim = self.net.config.hidden_size
        self.eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.net(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def load_tokenizer(directory: Path, settings: ModelSettings = CPU) -> Tokenizer:
    """The fast tokenizer beside a text encoder.

    Raises:
        ValueError: There is none.
    """
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"the model in {str(directory)!r} has no tokenizer.json; save its fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    config = read_json(directory / "config.json")
    pad_id = config.get("pad_token_id") or 0
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(max_tokens(directory, config))
    tokenizer.enable_padding(pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id) or "[PAD]")
    return tokenizer_of(tokenizer)


def max_tokens(directory: Path, config: Mapping[str, Any]) -> int:
    """The smallest of the limits that a model's files state.

    Args:
        config: Of the text model.
    """
    positions = config.get("max_position_embeddings", 512)
    if config["model_type"] in _SHIFTED_POSITIONS:
        positions -= config.get("pad_token_id", 1) + 1
    limits = [positions]
    for name, key in (("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")):
        if (directory / name).is_file():
            limits.append(read_json(directory / name).get(key) or positions)
    return int(min(limits))


def pretrained(directory: Path, settings: ModelSettings = CPU) -> Any:
    """The `AutoModel` in float32, without a pooler that was never trained.

    Raises:
        ValueError: The weights cannot be read, or do not fit the configuration.
    """
    from transformers import AutoModel

    try:
        with quiet():
            net, loading = AutoModel.from_pretrained(
                directory,
                dtype=torch.float32,
                weights_only=True,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
            )
    except BROKEN_WEIGHTS as error:
        raise ValueError(
            f"the weights in {str(directory)!r} cannot be read ({why_unreadable(error)}); copy or fetch the whole model anew"
        ) from error
    missing = sorted(loading["missing_keys"])
    if any(name.startswith("pooler.") for name in missing):
        net.pooler = None  # a classifier's checkpoint has none, and transformers has made a random one
    if lacking := [name for name in missing if not name.startswith("pooler.")]:
        raise ValueError(f"the weights in {str(directory)!r} lack {', '.join(lacking[:3])}; save the whole model there")
    return net.eval()


def cells(hidden: torch.Tensor) -> torch.Tensor:
    """[n, c, h, w] or [n, tokens, d] -> [n, places, d]."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def num_special_tokens(config: Any, size: int, num_tokens: int) -> int:
    """How many class and register tokens stand before the patches: none in CNNs and pyramids (Swin), which end with
    fewer places than patches."""
    patch_size = getattr(config, "patch_size", None)
    return max(0, num_tokens - (size // patch_size) ** 2) if patch_size else 0
