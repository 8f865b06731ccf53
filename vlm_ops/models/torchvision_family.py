"""`torchvision:NAME` or `torchvision:NAME:WEIGHTS`: the classifiers of torchvision, such as `torchvision:resnet50`.

WEIGHTS is a name that torchvision knows (`IMAGENET1K_V2`; without one, the model's default), or the path of a
state dict (`.pth` or `.safetensors`). Its images are prepared as for the default weights, or, where the file is
called as torchvision calls one of its own, as for those. Named weights are fetched by torchvision on first use.

`features` are the input of the last linear layer, `grid` the last feature map before it is pooled, or the patch
tokens of a transformer, `labels` the probabilities of the classes. There is no text side.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.hub import download_url_to_file
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vlm_ops.models import ModelInfo
from vlm_ops.models.backbones import BackboneImageModel, sha256_of
from vlm_ops.models.settings import ModelSettings
from vlm_ops.preprocessing import Preprocessing

_IMAGENET_CLASSES = 1000
_MODELS = tuple(list_models(module=torchvision.models))
_SQUEEZENETS = ("squeezenet1_0", "squeezenet1_1")


def describe(spec: str, settings: ModelSettings | None = None) -> ModelInfo:
    """Reads a local file of weights once a process, to hash it; fetches nothing.

    Raises:
        ValueError: torchvision knows no such model or weights, or there is no such file.
    """
    name, weights, path = _parse(spec)
    produces = frozenset({"features", "grid", "labels"})
    if path is None:
        return ModelInfo(spec, f"{weights.name}-{_digest(weights)}", produces, encodes_text=False)
    return ModelInfo(f"torchvision:{name}:{path}", sha256_of(path)[:12], produces, encodes_text=False)


def load_image_model(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> BackboneImageModel:
    name, weights, path = _parse(spec)
    num_classes = _IMAGENET_CLASSES if path is None else _num_classes(name, path)
    return BackboneImageModel(
        describe(spec), _preprocessing(weights), lambda: load_image_backbone(spec), settings, outputs,
        _class_names(weights, num_classes),
    )  # fmt: skip


def fetch(spec: str, directory: Path, settings: ModelSettings) -> str | None:
    """Fetches named weights as a file, whose content its name tells the hash of."""
    name, weights, path = _parse(spec)
    if path is not None:
        return None
    file, digest = directory.resolve() / Path(weights.url).name, _digest(weights)
    if not (file.is_file() and sha256_of(file).startswith(digest)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            download_url_to_file(weights.url, str(file), hash_prefix=digest, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"cannot fetch the weights {weights.name} of {name} from {weights.url} into {str(directory)!r}: {error}; "
                "try again, or on a machine with network and room"
            ) from error
    return f"torchvision:{name}:{file}"


def load_image_backbone(spec: str) -> TorchvisionBackbone | SqueezeNetBackbone:
    """The classifier as an `ImageBackbone`; as a `ClassifyingBackbone` but for SqueezeNet.

    Raises:
        ValueError: The weights cannot be fetched or read, or do not fit the model.
    """
    name, weights, path = _parse(spec)
    net = _fetched(name, weights) if path is None else _from_file(name, weights, path)
    return (SqueezeNetBackbone if name in _SQUEEZENETS else TorchvisionBackbone)(net, weights).eval()


class _Normalised(nn.Module):
    """What the backbones share: images prepared as torchvision's weights say."""

    embedding_dim = 0
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.preprocessing = _preprocessing(weights)
        transforms = weights.transforms()
        self.register_buffer("mean", torch.tensor(transforms.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transforms.std).view(3, 1, 1), persistent=False)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class TorchvisionBackbone(_Normalised):
    """A `ClassifyingBackbone`: a classifier of torchvision, cut before its last layer. Besides `features` and `grid` it
    gives `labels`.

    Args:
        net: The classifier; it is taken apart.
        weights: The torchvision weights that say how its images are prepared.
    """

    def __init__(self, net: nn.Module, weights: Any) -> None:
        super().__init__(weights)
        head_name, self.head = _head(net)
        self.feature_dim = self.head.in_features
        self.class_names = _class_names(weights, self.head.out_features)
        net.set_submodule(head_name, nn.Identity())
        blank = torch.zeros(1, 3, self.preprocessing.size, self.preprocessing.size)
        grid_name = _grid_name(net.eval(), blank)
        # In training mode some models have further outputs; nothing beyond the two nodes is kept of either.
        self.net = create_feature_extractor(
            net, {grid_name: "grid", head_name: "features"}, suppress_diff_warning=True
        ).eval()
        with torch.no_grad():
            self.grid_dim = _cells(self.net(blank)["grid"]).shape[2]

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.net(self.normalised(pixels))
        features = outputs["features"]
        return {"features": features, "grid": _cells(outputs["grid"]), **self.of_features(features)}

    def of_features(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"labels": self.head(features).softmax(1)}

    @property
    def class_weights(self) -> torch.Tensor:
        return self.head.weight.detach()


class SqueezeNetBackbone(_Normalised):
    """An `ImageBackbone` of SqueezeNet, which classifies each place of its map and pools after that: `features` are the mean
    of the map, and `labels` no function of them."""

    feature_dim = grid_dim = 512

    def __init__(self, net: nn.Module, weights: Any) -> None:
        super().__init__(weights)
        self.net: Any = net

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = self.net.features(self.normalised(pixels))
        labels = self.net.classifier(grid).flatten(1).softmax(1)
        return {"features": grid.mean((2, 3)), "grid": _cells(grid), "labels": labels}


def _cells(grid: torch.Tensor) -> torch.Tensor:
    """[n, c, h, w], or [n, 1 + cells, c] with a class token -> [n, cells, c]."""
    return grid.flatten(2).transpose(1, 2) if grid.ndim == 4 else grid[:, 1:]


def _grid_name(net: nn.Module, blank: torch.Tensor) -> str:
    """The last node of a network's graph that still has several places of the image: a map, or tokens."""
    names = get_graph_node_names(net, suppress_diff_warning=True)[1]
    with torch.no_grad():
        outputs = create_feature_extractor(net, names, suppress_diff_warning=True)(blank)
    shapes = {name: output.shape for name, output in outputs.items() if torch.is_tensor(output)}
    return [name for name, shape in shapes.items() if len(shape) > 2 and min(shape[1:3]) > 1][-1]


def _head(net: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the layer that gives the logits."""
    return [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]


def _class_names(weights: Any, num_classes: int) -> tuple[str, ...]:
    if num_classes == _IMAGENET_CLASSES:
        return tuple(weights.meta["categories"])
    return tuple(f"class {i}" for i in range(num_classes))


def _preprocessing(weights: Any) -> Preprocessing:
    transforms = weights.transforms()
    size, resized = transforms.crop_size[0], transforms.resize_size[0]
    return Preprocessing(size, "cover", min(1.0, size / resized), transforms.interpolation.value)


def _digest(weights: Any) -> str:
    """The first digits of a file's SHA-256, by which torchvision names it: resnet50-11ad3fa6.pth."""
    return Path(weights.url).stem.rpartition("-")[2]


def _parse(spec: str) -> tuple[str, Any, Path | None]:
    """Model name, torchvision weights (of a file: those of its name, else the default ones) and file."""
    name, _, argument = spec.removeprefix("torchvision:").partition(":")
    if name not in _MODELS:
        raise ValueError(f"unknown model {spec!r}; torchvision has {', '.join(_MODELS)}")
    known = get_model_weights(name)
    default = known["DEFAULT"]
    if not argument or argument in known.__members__:
        return name, known[argument] if argument else default, None
    path = Path(argument).expanduser().resolve()
    if path.suffix not in (".pth", ".pt", ".safetensors") or not path.is_file():
        names = ", ".join(weights.name for weights in known)
        raise ValueError(
            f"no weights {argument!r} for {name}; use {names}, or the path of a state dict (.pth, .pt or .safetensors)"
        )
    return name, next((weights for weights in known if Path(weights.url).name == path.name), default), path


def _fetched(name: str, weights: Any) -> nn.Module:
    try:
        return get_model(name, weights=weights, progress=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot fetch the weights {weights.name} of {name} from {weights.url}: {error}; fetch them on a machine with "
            f"network, `beamsight fetch-model torchvision:{name}:{weights.name} --to DIR`, and name the file, "
            f"torchvision:{name}:DIR/{Path(weights.url).name}"
        ) from error


def _from_file(name: str, weights: Any, path: Path) -> nn.Module:
    state = _read_state(path)
    # Some weights of vision transformers are for larger images than their architecture is by itself.
    options = {"image_size": weights.meta["min_size"][0]} if name.startswith("vit_") else {}
    net = get_model(name, weights=None, num_classes=_num_classes(name, path), **options)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise _misfit(name, path) from error
    if hasattr(net, "transform_input"):  # GoogLeNet, Inception: as torchvision sets it for weights of its own
        net.transform_input = True
    return net


def _num_classes(name: str, path: Path) -> int:
    if name in _SQUEEZENETS:
        head_name = "classifier.1"
    else:
        with torch.device("meta"):
            head_name, _ = _head(get_model(name, weights=None))
    state = _read_state(path)
    if f"{head_name}.weight" not in state:
        raise _misfit(name, path)
    return len(state[f"{head_name}.weight"])


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights in {str(path)!r}; save a model's state_dict() there") from error


def _misfit(name: str, path: Path) -> ValueError:
    return ValueError(f"the weights in {str(path)!r} are not those of a {name}; name the model that they belong to")
