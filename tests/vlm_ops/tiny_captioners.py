"""Tiny captioners of every family with random weights, saved as their repositories are laid out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

t: Any = transformers  # whose types know less than its classes take

WORDS = (
    "a the black white dog cat runs sits through snow on grass two people ride red blue ball tree house "
    "describe this image in one plain sentence an of caption en short description what does photo"
)
SIDE = 32
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 2048}
CHAT = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(*special: str, **named: str) -> Any:
    """Of WORDS, by white space; named special tokens (`image_token="<image>"`) become attributes."""
    signs = ["<pad>", "<unk>", "<s>", "</s>", *special, *named.values()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*signs, *WORDS.split()]))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
        extra_special_tokens=named or None,
    )


def framed(words: Any) -> Any:
    """With start and end sign around a text, as BERT's tokenizers put them."""
    words.backend_tokenizer.post_processor = tokenizers.processors.BertProcessing(("</s>", 3), ("<s>", 2))
    words.cls_token, words.sep_token = "<s>", "</s>"
    return words


def _ids(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip


def blip() -> tuple[Any, Any]:
    words = framed(tokenizer())
    text = {**_TEXT, **_ids(words), "sep_token_id": 3, "encoder_hidden_size": 16, "max_position_embeddings": 64}
    config = t.BlipConfig(
        text_config=text, vision_config={**_VISION, "image_size": SIDE, "patch_size": 8}, projection_dim=16
    )
    processor = t.BlipProcessor(t.BlipImageProcessor(size={"height": SIDE, "width": SIDE}), words)
    return t.BlipForConditionalGeneration(config), processor


def git() -> tuple[Any, Any]:
    words = framed(tokenizer())
    config = t.GitConfig(
        vision_config={**_VISION, "image_size": SIDE, "patch_size": 8},
        **_TEXT,
        **_ids(words),
        max_position_embeddings=64,
    )
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return t.GitForCausalLM(config), t.GitProcessor(images, words)


def vit_gpt2() -> tuple[Any, Any]:
    words = tokenizer()
    words.pad_token = words.eos_token  # as GPT-2's
    encoder = t.ViTModel(t.ViTConfig(**_VISION, image_size=SIDE, patch_size=8), add_pooling_layer=False)
    config = t.GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3,
        add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    decoder = t.GPT2LMHeadModel(config)
    model = t.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.generation_config = t.GenerationConfig(
        decoder_start_token_id=2, bos_token_id=2, eos_token_id=3, pad_token_id=3, max_length=16, num_beams=3
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 3
    return model, (t.ViTImageProcessor(size={"height": SIDE, "width": SIDE}), words)


def florence2() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>")
    config = t.Florence2Config(
        vision_config={
            "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
            "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2],
            "window_size": 4, "projection_dim": 16,
        },
        text_config={
            "model_type": "bart", **_ids(words), "d_model": 16, "encoder_layers": 1, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 128, "decoder_start_token_id": 3, "forced_bos_token_id": None,
        },
        image_token_id=words.image_token_id,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    images.image_seq_length = 17
    model = t.Florence2ForConditionalGeneration(config)
    model.generation_config = t.GenerationConfig(
        bos_token_id=2, eos_token_id=3, pad_token_id=0, decoder_start_token_id=3, num_beams=3, no_repeat_ngram_size=3,
        early_stopping=True,
    )  # fmt: skip
    return model, t.Florence2Processor(images, words, post_processor_config={"pure_text": {}})


def blip2() -> tuple[Any, Any]:
    words = tokenizer()
    images = t.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = t.Blip2Processor(images, words, num_query_tokens=4)
    return t.Blip2ForConditionalGeneration(_blip2_config(t.Blip2Config, words)), processor


def instructblip() -> tuple[Any, Any]:
    words = tokenizer()
    images = t.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = t.InstructBlipProcessor(images, words, framed(tokenizer()), num_query_tokens=4)
    return t.InstructBlipForConditionalGeneration(_blip2_config(t.InstructBlipConfig, words)), processor


def _blip2_config(config: Any, words: Any) -> Any:
    return config(
        vision_config={**_VISION, "image_size": SIDE, "patch_size": 8},
        qformer_config={**_TEXT, "encoder_hidden_size": 16, "vocab_size": len(words), "max_position_embeddings": 64},
        text_config={
            "model_type": "opt", **_ids(words), "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
        },
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


def paligemma() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>")
    images = t.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, words)
    config = t.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": SIDE, "patch_size": 8, "projection_dim": 16},
        text_config={"model_type": "gemma", **_LLAMA, **_ids(words), "head_dim": 8},
        image_token_id=words.image_token_id, projection_dim=16,
    )  # fmt: skip
    return t.PaliGemmaForConditionalGeneration(config), processor


def kosmos2() -> tuple[Any, Any]:
    words = tokenizer()
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = t.Kosmos2Processor(images, words, 16)
    config = t.Kosmos2Config(
        text_config={
            **_ids(words), "embed_dim": 16, "layers": 2, "ffn_dim": 32, "attention_heads": 2, "max_position_embeddings": 256,
        },
        vision_config={**_VISION, "image_size": SIDE, "patch_size": 8},
        latent_query_num=64,
    )  # fmt: skip
    return t.Kosmos2ForConditionalGeneration(config), processor


def llava() -> tuple[Any, Any]:
    words = tokenizer("user", "assistant", ":", image_token="<image>")
    # As Llama's tokenizer, whose start sign the chat template puts too.
    words.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 2)])
    config = t.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": SIDE, "patch_size": 8},
        text_config={"model_type": "llama", **_LLAMA, **_ids(words)},
        image_token_id=words.image_token_id, image_seq_length=16,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = t.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="<s>" + CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    words = tokenizer("user", "assistant", ":", image_token="<image>")
    points = [[32, 64], [64, 32], [64, 64]]
    config = t.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": SIDE, "patch_size": 8},
        text_config={"model_type": "llama", **_LLAMA, **_ids(words)},
        image_token_id=words.image_token_id, image_grid_pinpoints=points,
    )  # fmt: skip
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=points
    )
    processor = t.LlavaNextProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return t.LlavaNextForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = tokenizer(
        *places, "user", "assistant", ":", "<end_of_utterance>", image_token="<image>",
        fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
    )  # fmt: skip
    config = t.SmolVLMConfig(
        vision_config={**_VISION, "image_size": SIDE, "patch_size": 8},
        text_config={"model_type": "llama", **_LLAMA, **_ids(words)},
        image_token_id=words.image_token_id, scale_factor=2,
    )  # fmt: skip
    images = t.SmolVLMImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    video = t.SmolVLMVideoProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = t.SmolVLMProcessor(
        images, words, video, image_seq_len=4, chat_template=CHAT.replace("IMAGE", "<image>")
    )
    return t.SmolVLMForConditionalGeneration(config), processor


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    return _qwen(t.Qwen2VLConfig, t.Qwen2VLForConditionalGeneration, t.Qwen2VLProcessor, vision)


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 8,
        "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(t.Qwen2_5_VLConfig, t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLProcessor, vision)


def qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 8,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen(t.Qwen3VLConfig, t.Qwen3VLForConditionalGeneration, t.Qwen3VLProcessor, vision, head_dim=8)


def _qwen(config: Any, model: Any, processor: Any, vision: dict[str, Any], **text: Any) -> tuple[Any, Any]:
    words = tokenizer(
        "user",
        "assistant",
        ":",
        "<|vision_start|>",
        "<|vision_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    made = config(
        vision_config=vision,
        text_config={
            **_LLAMA, **_ids(words), **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "type": "mrope"},
        },
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    images = t.Qwen2VLImageProcessor(size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96}, patch_size=8)
    video = (t.Qwen3VLVideoProcessor if "Qwen3" in processor.__name__ else t.Qwen2VLVideoProcessor)(patch_size=8)
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return model(made), processor(images, words, video, chat_template=template)


def gemma3() -> tuple[Any, Any]:
    words = tokenizer(
        "user", "assistant", ":", image_token="<image_soft_token>", boi_token="<boi>", eoi_token="<eoi>"
    )  # fmt: skip
    config = t.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": SIDE, "patch_size": 8},
        text_config={**_LLAMA, **_ids(words), "head_dim": 8, "sliding_window": 512},
        mm_tokens_per_image=4, image_token_index=words.image_token_id, boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )  # fmt: skip
    images = t.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = t.Gemma3Processor(images, words, image_seq_length=4, chat_template=CHAT.replace("IMAGE", "<boi>"))
    return t.Gemma3ForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    words = tokenizer(
        "user", "assistant", ":", start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    config = t.InternVLConfig(
        vision_config={**_VISION, "image_size": [SIDE, SIDE], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **_LLAMA, **_ids(words)},
        image_token_id=words.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    processor = t.InternVLProcessor(
        t.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4), words,
        t.InternVLVideoProcessor(size=size), image_seq_length=4, chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>"),
    )  # fmt: skip
    return t.InternVLForConditionalGeneration(config), processor


def pix2struct() -> tuple[Any, Any]:
    words = tokenizer()
    layers = {"hidden_size": 16, "d_kv": 8, "d_ff": 32}
    config = t.Pix2StructConfig(
        text_config={
            **_ids(words),
            **layers,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "is_decoder": True,
        },
        vision_config={**layers, "patch_embed_hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 1},
    )
    return t.Pix2StructForConditionalGeneration(config), t.Pix2StructProcessor(t.Pix2StructImageProcessor(), words)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    make.__name__: make
    for make in (
        blip, git, vit_gpt2, florence2, blip2, instructblip, paligemma, kosmos2, llava, llava_next, smolvlm, qwen2_vl,
        qwen2_5_vl, qwen3_vl, gemma3, internvl, pix2struct,
    )
}  # fmt: skip


# Their places in images, more than there are words, would be all that they speak of.
_SPEAKS_IN_TOKENS = ("paligemma", "kosmos2")


# With others they write the same of every image.
_SEEDS = {"blip2": 2, "gemma3": 4, "paligemma": 7}


def save(name: str, path: Path) -> None:
    """Saves a family's tiny model, with weights so large that what it writes depends on the image."""
    torch.manual_seed(_SEEDS.get(name, 0))
    model, processor = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / 3)
        if name in _SPEAKS_IN_TOKENS:
            words = processor.tokenizer
            head = getattr(model, "text_model", model).get_output_embeddings()
            head.weight[[id_ for id_ in words.added_tokens_decoder if id_ != words.eos_token_id]] *= 0.01
    model.eval().save_pretrained(path)
    for each in processor if isinstance(processor, tuple) else (processor,):
        each.save_pretrained(path)
