"""`dir:PATH`: a model that `beamsight train` has written.

A directory holds `config.json` (what kind of model it is, on which base, in which shapes),
`model.safetensors` (the weights), a model card and the curves of its training. The base is itself a
model spec, so that trained models stand on one another.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from vlm_ops.models import (
    ImageBackbone,
    ImageModel,
    ModelInfo,
    TextBackbone,
    TextModel,
    Tokenizer,
    describe_model,
)
from vlm_ops.models import load_image_backbone as load_backbone_below
from vlm_ops.models import load_image_model as load_image_model_below
from vlm_ops.models import load_text_backbone as load_text_backbone_below
from vlm_ops.models import load_text_model as load_text_model_below
from vlm_ops.models import load_tokenizer as load_tokenizer_below
from vlm_ops.models.backbones import FIELDS, BackboneImageModel
from vlm_ops.models.settings import ModelSettings

CONFIG, WEIGHTS, CARD, CURVES = "config.json", "model.safetensors", "README.md", "curves.svg"
# What loads each kind: modules with `describe`, `load_image_model` and, where the kind changes what an image or a text
# becomes, `image_backbone`, `text_model` and `text_backbone`.
_KINDS = {
    "dual-encoder": "vlm_ops.models.aligned",
    "captioner": "vlm_ops.models.captioning",
    "matcher": "vlm_ops.models.matching",
}


# What is left of a base once there are heads on it or it was fine-tuned.
OF_BACKBONES = frozenset(FIELDS)


class ModelDirectory:
    """A directory that was found whole."""

    def __init__(self, path: Path) -> None:
        """Reads the configuration.

        Raises:
            ValueError: There is no model, it is not whole, or its base is of another revision here.
        """
        self.path = path
        try:
            self.config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"no model in {str(path)!r}: there is no {CONFIG}; `beamsight train` writes one"
            ) from error
        except ValueError as error:
            raise ValueError(f"the model in {str(path)!r} cannot be read: {CONFIG}: {error}") from error
        self.kind = self.config.get("kind")
        if self.kind is None and "model_type" in self.config:
            raise ValueError(f"the model in {str(path)!r} is one of transformers; name it hf:{path}")
        if self.kind not in _KINDS:
            raise ValueError(f"the model in {str(path)!r} is a {self.kind!r}, which this version cannot load")
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"the model in {str(path)!r} is not whole: there is no {WEIGHTS}")
        for side in ("base", "text_base"):
            if self.config.get(side):
                self._check_base(self.config[side], self.config[f"{side}_revision"])

    @property
    def base(self) -> ModelInfo:
        """The model below, of which the images come."""
        return describe_model(self.config["base"])

    @property
    def text_base(self) -> ModelInfo:
        """The model whose text side stands below: the base, unless another was named."""
        return describe_model(self.config.get("text_base") or self.config["base"])

    @property
    def revision(self) -> str:
        return _hash_of(str(self.path), (self.path / CONFIG).stat().st_mtime_ns)

    def weights(self, part: str) -> dict[str, Any]:
        """The tensors under a name (`image` for `image.skip.weight`), without it, in float32."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.path / WEIGHTS)
        except SafetensorError as error:
            raise ValueError(
                f"the model in {str(self.path)!r} cannot be read: {WEIGHTS}: {error}; copy it anew, or train it again"
            ) from error
        return {
            name.removeprefix(f"{part}."): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{part}.")
        }

    def fill(self, module: Any, part: str) -> Any:
        """Loads a part's weights into a module, and puts it into evaluation mode.

        Raises:
            ValueError: They cannot be read, or are of other shapes.
        """
        try:
            module.load_state_dict(self.weights(part))
        except RuntimeError as error:
            raise ValueError(
                f"the model in {str(self.path)!r} is broken: its weights are not of the shapes that {CONFIG} tells of; "
                "copy it anew, or train it again"
            ) from error
        return module.eval()

    @property
    def base_produces(self) -> frozenset[str]:
        """What `base_image_model` can give."""
        produces = self.base.produces
        return produces & OF_BACKBONES if "image" in self.config["finetuned"] else produces

    def base_image_model(self, info: ModelInfo, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel:
        """The base's image model under the name of what stands on it; as it was fine-tuned, where it was."""
        if "image" in self.config["finetuned"]:
            return self.backbone_image_model(info, self.base_image_backbone, settings, outputs)
        model = load_image_model_below(self.base.spec, settings, outputs)
        model.info = info
        return model

    def backbone_image_model(
        self, info: ModelInfo, load: Callable[[], Any], settings: ModelSettings, outputs: frozenset[str]
    ) -> BackboneImageModel:
        """An image model over a backbone of one's own, with the preprocessing and the class names of the base."""
        base = load_image_model_below(self.base.spec, settings, frozenset())
        return BackboneImageModel(info, base.preprocessing, load, settings, outputs, base.label_names)

    def base_text_model(self, info: ModelInfo, settings: ModelSettings) -> TextModel:
        """The base's text model under the name of what stands on it."""
        model = load_text_model_below(self.base.spec, settings)
        model.info = info
        return model

    def base_image_backbone(self) -> Any:
        """The image side of the base; as it was fine-tuned, where it was."""
        backbone = load_backbone_below(self.base.spec)
        return self.fill(backbone, "image_backbone") if "image" in self.config["finetuned"] else backbone

    def base_text_backbone(self) -> Any:
        """The text side of the base; as it was fine-tuned, where it was."""
        backbone = load_text_backbone_below(self.text_base.spec)
        return self.fill(backbone, "text_backbone") if "text" in self.config["finetuned"] else backbone

    def _check_base(self, spec: str, revision: str) -> None:
        installed = describe_model(spec)
        if installed.revision != revision:
            raise ValueError(
                f"model 'dir:{self.path}' was trained on {spec}@{revision}, but {installed.name} is installed here; "
                "install the version that it was trained on, or train it again"
            )


def describe(spec: str, settings: ModelSettings | None = None) -> ModelInfo:
    # By its full path, so that a catalog finds its encoder from any working directory.
    path = path_of(spec)
    return describe_at(path, f"dir:{path}")


def load_image_model(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel:
    return load_image_model_at(path_of(spec), describe(spec), settings, outputs)


def load_text_model(spec: str, settings: ModelSettings) -> TextModel:
    return load_text_model_at(path_of(spec), describe(spec), settings)


def load_image_backbone(spec: str) -> ImageBackbone:
    return load_image_backbone_at(path_of(spec))


def load_text_backbone(spec: str) -> TextBackbone:
    return load_text_backbone_at(path_of(spec))


def load_tokenizer(spec: str) -> Tokenizer:
    return load_tokenizer_below(ModelDirectory(path_of(spec)).text_base.spec)


def describe_at(path: Path, spec: str) -> ModelInfo:
    """What the model of a directory is, by the name it goes by."""
    directory = ModelDirectory(path)
    return _kind(directory).describe(directory, spec)


def load_image_model_at(path: Path, info: ModelInfo, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel:
    directory = ModelDirectory(path)
    return _kind(directory).load_image_model(directory, info, settings, outputs)


def load_text_model_at(path: Path, info: ModelInfo, settings: ModelSettings) -> TextModel:
    """That of the kind, where it changes what a text becomes; else that of the base."""
    directory = ModelDirectory(path)
    own = getattr(_kind(directory), "text_model", None)
    return own(directory, info, settings) if own else directory.base_text_model(info, settings)


def load_image_backbone_at(path: Path) -> ImageBackbone:
    """That of the kind, where it changes what an image becomes; else that of the base."""
    directory = ModelDirectory(path)
    own = getattr(_kind(directory), "image_backbone", None)
    return own(directory) if own else directory.base_image_backbone()


def load_text_backbone_at(path: Path) -> TextBackbone:
    """That of the kind, where it changes what a text becomes; else that of the base."""
    directory = ModelDirectory(path)
    own = getattr(_kind(directory), "text_backbone", None)
    return own(directory) if own else directory.base_text_backbone()


def _kind(directory: ModelDirectory) -> ModuleType:
    return importlib.import_module(_KINDS[str(directory.kind)])


def path_of(spec: str) -> Path:
    """The directory that `dir:PATH`, or a plain path, names."""
    return Path(spec.removeprefix("dir:")).expanduser().resolve()


@lru_cache(maxsize=8)
def _hash_of(path: str, modified_ns: int) -> str:
    """Of the weights and of all that decides what they mean; `config.json` is written last."""
    digest = hashlib.sha256((Path(path) / WEIGHTS).read_bytes())
    digest.update((Path(path) / CONFIG).read_bytes())
    return digest.hexdigest()[:12]
