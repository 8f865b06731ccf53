"""A trained matcher: its base, and the probability that a text describes an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_ops.models import ImageEncoding, ImageModel, ModelInfo, load_text_model, load_tokenizer
from vlm_ops.models.calibration import Calibration
from vlm_ops.models.directory import ModelDirectory
from vlm_ops.models.settings import ModelSettings


def describe(directory: ModelDirectory, spec: str) -> ModelInfo:
    base = directory.base
    return ModelInfo(spec, directory.revision, directory.base_produces | {"match"}, base.encodes_text, base.map_dim)


def load_image_model(
    directory: ModelDirectory, info: ModelInfo, settings: ModelSettings, outputs: frozenset[str]
) -> ImageModel:
    if "match" not in outputs:
        return directory.base_image_model(info, settings, outputs)
    return MatcherImageModel(directory, info, settings, outputs)


class MatcherImageModel:
    """The base's encodings; pairs are matched by the trained network, through torch."""

    def __init__(
        self, directory: ModelDirectory, info: ModelInfo, settings: ModelSettings, outputs: frozenset[str]
    ) -> None:
        import torch

        self.info = info
        below = directory.base_image_model(info, settings, (outputs - {"match"}) | {"features"})
        self.preprocessing = below.preprocessing
        self.label_names = below.label_names
        self.encode_images = below.encode_images
        self._matcher = _load_matcher(directory).to(settings.device)
        self._encode = _text_inputs(directory, settings)
        self._calibration = Calibration(**directory.config["calibration"])
        self._torch, self._device = torch, settings.device

    def match(self, encoding: ImageEncoding, rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        if not len(texts):
            return np.empty(0, np.float32)
        assert encoding.features is not None
        with self._torch.inference_mode():
            images = self._matcher.image_vectors({"features": self._tensor(encoding.features[list(rows)])})
            inputs = {name: self._tensor(values) for name, values in self._encode(texts).items()}
            logits = self._matcher(images, self._matcher.text_vectors(inputs)).float().cpu().numpy()
        return self._calibration(logits)

    def _tensor(self, values: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


def _text_inputs(
    directory: ModelDirectory, settings: ModelSettings
) -> Callable[[Sequence[str]], Mapping[str, np.ndarray]]:
    """What the matcher takes for texts: tokens where its text model was fine-tuned, vectors where it was not."""
    if "text" in directory.config["finetuned"]:
        return load_tokenizer(directory.text_base.spec)
    texts_below = load_text_model(directory.text_base.spec, settings)
    return lambda texts: {"vectors": texts_below.encode_texts(texts)}


def _load_matcher(directory: ModelDirectory) -> Any:
    """The network. Of a fine-tuned image side it needs nothing: its encodings are those already."""
    from vlm_ops.models.matcher import Matcher, MatcherConfig

    matcher = directory.fill(Matcher(MatcherConfig(**directory.config["shapes"])), "matcher")
    if "text" in directory.config["finetuned"]:
        matcher.text_backbone = directory.base_text_backbone()
    return matcher.eval()
