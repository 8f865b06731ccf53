"""`hf:` dual encoders: whatever `AutoModel` gives with `get_image_features` and `get_text_features` (CLIP, SigLIP, ALIGN,
Chinese-CLIP, AltCLIP and others).

`embedding` is what the two functions give, L2-normalised; `features` the same of images before that, `grid` the feature
map or patch tokens of the image tower. Texts are cut and padded as the model's own processor does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.models import Tokenizer
from vlm_ops.models.hf_backbones import Normalised, cells, max_tokens, num_special_tokens, pretrained

# Trained on texts that are padded to the full length, and without a mask: google/siglip-* by their model cards, ALIGN
# by its processor's defaults, which Siglip2Processor has too.
_PADDED_TO = {"siglip": None, "siglip2": 64, "align": 64}


class ImageTower(Normalised):
    """The image side of a dual encoder as an `ImageBackbone`.

    Raises:
        ValueError: The weights or the image processor are missing or do not fit.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False) -> None:
        super().__init__(directory, trust_remote_code)
        self.net = pretrained(directory, trust_remote_code)
        with torch.no_grad():
            features, hidden = self._hidden(self.blank())
        config = getattr(self.net.config, "vision_config", self.net.config)
        self.feature_dim = self.embedding_dim = features.shape[1]
        self.grid_dim, self.num_special_tokens = 0, 0
        if hidden is not None:
            self.grid_dim = hidden.shape[2]
            self.num_special_tokens = num_special_tokens(config, self.preprocessing.size, hidden.shape[1])
        _drop(self.net, "text")

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features, hidden = self._hidden(pixels)
        outputs = {"features": features, "embedding": F.normalize(features, dim=-1)}
        return outputs if hidden is None else outputs | {"grid": hidden[:, self.num_special_tokens :]}

    def _hidden(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.net.get_image_features(pixel_values=self.normalised(pixels))
        if torch.is_tensor(output):  # code of a repository, as transformers before 5
            return output, None
        return output.pooler_output, cells(output.last_hidden_state)


class TextTower(nn.Module):
    """The text side of a dual encoder as a `TextBackbone`.

    Raises:
        ValueError: The weights are missing or do not fit.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False) -> None:
        super().__init__()
        self.net = pretrained(directory, trust_remote_code)
        self.reads_mask = "attention_mask" in _tokenizer(directory, trust_remote_code).model_input_names
        with torch.no_grad():
            self.text_dim = self(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)).shape[1]
        _drop(self.net, "vision")

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask} if self.reads_mask else {"input_ids": ids}
        output = self.net.get_text_features(**inputs)
        return F.normalize(output if torch.is_tensor(output) else output.pooler_output, dim=-1)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer beside a dual encoder, which pads and cuts as the model's processor does.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoConfig

    tokenizer = _tokenizer(directory, trust_remote_code)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    longest = max_tokens(directory, getattr(config, "text_config", config).to_dict())
    is_padded = config.model_type in _PADDED_TO
    if is_padded:
        longest = min(longest, _PADDED_TO[config.model_type] or longest)

    def tokenize(texts: Sequence[str]) -> Mapping[str, np.ndarray]:
        tokens = tokenizer(
            list(texts),
            padding="max_length" if is_padded else True,
            truncation=True,
            max_length=longest,
            return_attention_mask=True,
            return_tensors="np",
        )
        return {"ids": tokens["input_ids"].astype(np.int64), "mask": tokens["attention_mask"].astype(np.int64)}

    return tokenize


def _tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model in {str(directory)!r} has no tokenizer that can be read (tokenizer.json); save its own there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        ) from error


def _drop(net: Any, side: str) -> None:
    """Lets go of the weights of a tower that is not called."""
    for name in (f"{side}_model", f"{side}_projection"):
        if isinstance(getattr(net, name, None), nn.Module):
            setattr(net, name, None)
