"""`hf:` dual encoders: whatever `AutoModel` gives with `get_image_features` and `get_text_features` (CLIP, SigLIP, ALIGN,
Chinese-CLIP, AltCLIP and others).

`embedding` is what the two functions give, L2-normalised; `features` the same of images before that, `grid` the feature
map or patch tokens of the image tower. Texts are cut and padded as the model's own processor does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.models import ImageEncoding, ModelInfo, Tokenizer
from vlm_ops.models.backbones import make_forward
from vlm_ops.models.hf_backbones import Normalised, cells, max_tokens, num_special_tokens, pretrained
from vlm_ops.models.hub import check_tokenizer, quiet
from vlm_ops.models.settings import CPU, ModelSettings
from vlm_ops.preprocessing import Preprocessing

# Trained on texts that are padded to the full length, and without a mask: google/siglip-* by their model cards, ALIGN
# by its processor's defaults, which Siglip2Processor has too.
_PADDED_TO: Mapping[str, int | None] = {"siglip": None, "siglip2": 64, "align": 64}

# Of what NaFlex's processor is given; it makes some 256 patches of 16 pixels, so that little is changed twice.
_LONGEST_SIDE = 1024


class ImageTower(Normalised):
    """The image side of a dual encoder as an `ImageBackbone`.

    Raises:
        ValueError: The weights or the image processor are missing or do not fit.
    """

    def __init__(self, directory: Path, settings: ModelSettings = CPU) -> None:
        super().__init__(directory, settings)
        self.net = pretrained(directory, settings)
        with torch.no_grad():
            features, hidden = self._hidden(self.blank())
        config = getattr(self.net.config, "vision_config", self.net.config)
        self.feature_dim = self.embedding_dim = features.shape[1]
        self.grid_dim, self.num_special_tokens = 0, 0
        if hidden is not None:
            self.grid_dim = hidden.shape[2]
            self.num_special_tokens = num_special_tokens(config, self.preprocessing.size, hidden.shape[1])
        _drop(self.net, "text")
        self.eval()

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

    def __init__(self, directory: Path, settings: ModelSettings = CPU) -> None:
        super().__init__()
        self.net = pretrained(directory, settings)
        self.reads_mask = "attention_mask" in _tokenizer(directory, settings).model_input_names
        with torch.no_grad():
            self.text_dim = self(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)).shape[1]
        _drop(self.net, "vision")
        self.eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask} if self.reads_mask else {"input_ids": ids}
        output = self.net.get_text_features(**inputs)
        return F.normalize(output if torch.is_tensor(output) else output.pooler_output, dim=-1)


class NaFlexImageModel:
    """The image side of a SigLIP 2 whose images keep their aspect ratio (NaFlex), as an `ImageModel`. Its processor makes the
    patches, of an image that is at most `_LONGEST_SIDE` long; it runs through torch.

    Raises:
        ValueError: The weights are missing or do not fit.
    """

    label_names: Sequence[str] = ()

    def __init__(
        self, info: ModelInfo, processor: Any, directory: Path, settings: ModelSettings, outputs: frozenset[str]
    ) -> None:
        self.info = info
        self.preprocessing = Preprocessing(_LONGEST_SIDE, "contain")
        self._processor, self._outputs = processor, outputs
        if not outputs:
            return
        if settings.engine != "torch" and not settings.may_run_by_torch:
            raise ValueError(
                f"model {info.spec!r} takes images of many sizes and runs through torch; use --engine torch"
            )
        net = pretrained(directory, settings)
        _drop(net, "text")
        blank = np.zeros((3, 32, 32), np.uint8)
        self._forward = make_forward(
            info.spec, lambda: _Patches(net), self._patches([blank, blank]), {}, replace(settings, engine="torch")
        )

    def encode_images(self, pixels: Sequence[np.ndarray]) -> ImageEncoding:
        """Of a list of n uint8[3, h, w]."""
        if not self._outputs:
            return ImageEncoding()
        (features,) = self._forward(self._patches(list(pixels) or [np.zeros((3, 16, 16), np.uint8)]))
        features = features[: len(pixels)]
        embeddings = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
        return ImageEncoding(
            features=features if "features" in self._outputs else None,
            embeddings=embeddings if "embedding" in self._outputs else None,
        )

    def _patches(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        inputs = self._processor(list(images), input_data_format="channels_first", return_tensors="np")
        return {name: np.asarray(inputs[name]) for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}


class _Patches(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        return self.net.get_image_features(
            pixel_values=pixel_values, pixel_attention_mask=mask, spatial_shapes=shapes
        ).pooler_output


def load_tokenizer(directory: Path, settings: ModelSettings = CPU) -> Tokenizer:
    """The tokenizer beside a dual encoder, which pads and cuts as the model's processor does.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoConfig

    tokenizer = _tokenizer(directory, settings)
    with quiet():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=settings.trust_remote_code)
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


def _tokenizer(directory: Path, settings: ModelSettings) -> Any:
    from transformers import AutoTokenizer

    check_tokenizer(directory, settings.trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=settings.trust_remote_code)
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
