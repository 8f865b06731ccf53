"""Tiny models with random weights, saved the way real ones are: one of every family that a spec can name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from tests.conftest import photo
from tests.vlm_ops import tiny_captioners
from vlm_ops.models.hf_preprocessing import is_naflex, read_preprocessing

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
# ResNet-50's layout, and the others in small; with each, an image processor of the kind that it is published with.
IMAGE_MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "resnet": (
        lambda: transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 16, 24, 32], depths=[3, 4, 6, 3])
        ),
        transformers.BitImageProcessor(size={"shortest_edge": 73}, crop_size={"height": 64, "width": 64}),
    ),
    "convnext": (
        lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 2, 1], layer_scale_init_value=1.0)
        ),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
    ),
    "vit": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)),
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    ),
    "dinov2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**{**VIT, "image_size": 64})),
        transformers.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    ),
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "black",
    "dog",
    "run",
    "##s",
    "through",
    "the",
    "snow",
    "two",
    "##dogs",
]
TEXTS = ["a black dog runs", "snow", "two dogs run through the snow", "", "a dog " * 20, "snow"]
_TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_CLIP_TEXT = {**_TEXT, "max_position_embeddings": 20, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
_CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
_STRETCHED = {"size": {"height": 32, "width": 32}}


def _clip() -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=_CLIP_TEXT, vision_config=VIT, projection_dim=12))


def _metaclip_2() -> Any:
    config = transformers.MetaClip2Config(text_config=_CLIP_TEXT, vision_config=VIT, projection_dim=12)
    return transformers.MetaClip2Model(config)


def _siglip() -> Any:
    text = {**_TEXT, "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VIT))


def _siglip2() -> Any:
    text = {**_TEXT, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {key: value for key, value in VIT.items() if key != "image_size"}
    return transformers.Siglip2Model(
        transformers.Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 16})
    )


def _align() -> Any:
    vision = {
        "image_size": 64, "width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 32, "in_channels": [8, 8],
        "out_channels": [8, 16], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
        "expand_ratios": [1, 6], "depthwise_padding": [],
    }  # fmt: skip
    text = {**_TEXT, "max_position_embeddings": 64}
    return transformers.AlignModel(transformers.AlignConfig(text_config=text, vision_config=vision, projection_dim=8))


def _chinese_clip() -> Any:
    config = transformers.ChineseCLIPConfig(text_config=_TEXT, vision_config=VIT, projection_dim=12)
    return transformers.ChineseCLIPModel(config)


def _altclip() -> Any:
    text = {**_TEXT, "project_dim": 12, "max_position_embeddings": 44, "bos_token_id": 2, "eos_token_id": 3}
    return transformers.AltCLIPModel(transformers.AltCLIPConfig(text_config=text, vision_config=VIT, projection_dim=12))


def _two_towers() -> Any:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VIT), transformers.BertConfig(**_TEXT), projection_dim=12
    )
    return transformers.VisionTextDualEncoderModel(config)


# With each, an image processor of the kind that it is published with, and how its processor pads texts: to the longest
# (None), or to a length.
DUAL_ENCODERS: dict[str, tuple[Callable[[], Any], Any, int | None]] = {
    "clip": (_clip, transformers.CLIPImageProcessor(**_CROPPED), None),
    "siglip": (_siglip, transformers.SiglipImageProcessor(**_STRETCHED), 12),
    "siglip2": (_siglip2, transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), 64),
    "align": (
        _align,
        transformers.EfficientNetImageProcessor(
            size={"height": 72, "width": 72}, crop_size={"height": 64, "width": 64}, do_center_crop=True, resample=2
        ),
        64,
    ),
    "chinese_clip": (_chinese_clip, transformers.ChineseCLIPImageProcessor(**_STRETCHED, do_center_crop=False), None),
    "altclip": (_altclip, transformers.CLIPImageProcessor(**_CROPPED), None),
    "metaclip_2": (_metaclip_2, transformers.CLIPImageProcessor(**_CROPPED), None),
    "vision-text": (_two_towers, transformers.ViTImageProcessor(**_STRETCHED), None),
}


def make_model(name: str, path: Path) -> str:
    """Saves a model into a new directory; its spec."""
    torch.manual_seed(0)
    path.mkdir(parents=True, exist_ok=True)
    if name == "torchvision":
        torch.save(settled(get_model("resnet18", weights=None), 224).state_dict(), path / "weights.pth")
        return f"torchvision:resnet18:{path / 'weights.pth'}"
    if name in tiny_captioners.FAMILIES:
        tiny_captioners.save(name, path)
        return f"hf:{path}"
    if name == "open_clip":
        return _open_clip(path)
    if name in DUAL_ENCODERS:
        make, processor, length = DUAL_ENCODERS[name]
        net = make()
        save_tokenizer(path, length or 12, has_mask=not name.startswith("siglip"))
        _enlarge(net)
    elif name in IMAGE_MODELS:
        make, processor = IMAGE_MODELS[name]
        net = make()
    else:
        assert name == "bert", name
        transformers.BertModel(transformers.BertConfig(**_TEXT)).save_pretrained(path)
        save_tokenizer(path)
        return f"hf:{path}"
    if not is_naflex(processor):
        settled(net, read_preprocessing(processor).size)
    net.save_pretrained(path)
    processor.save_pretrained(path)
    return f"hf:{path}"


def _open_clip(path: Path) -> str:
    text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    net = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    _enlarge(net)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path / "model.safetensors")
    return f"open_clip:{path}"


def _enlarge(net: nn.Module) -> None:
    """A random network of usual size says nearly the same of all; larger weights make it tell them apart."""
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)


def settled(net: Any, size: int) -> Any:
    """The network in evaluation mode, with statistics of images in its batch norms: without them, a random network
    gives nearly the same for every image."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = torch.randn(8, 3, size, size)
    with torch.no_grad():
        net.train()
        net.get_image_features(images) if hasattr(net, "get_image_features") else net(images)
    return net.eval()


def save_tokenizer(path: Path, max_length: int = 12, has_mask: bool = True) -> None:
    """A WordPiece tokenizer of WORDS."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"] if has_mask else ["input_ids"],
    ).save_pretrained(path)


def pictures(size: int, n: int) -> list[Image.Image]:
    return [photo(seed, size, size) for seed in range(n)]


def pixels_of(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.array(image).transpose(2, 0, 1) for image in images])


def close(actual: Any, desired: Any) -> None:
    """To 1e-4 of the largest value: those of random networks are not of order 1."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-4 * max(1.0, float(np.abs(np.asarray(desired)).max())))


def arrays(encoding: Any) -> dict[str, np.ndarray]:
    return {name: array for name, array in vars(encoding).items() if array is not None}
