"""Captioners of transformers, against `transformers` called by hand; on tiny models with random weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from deltalake import DeltaTable
from PIL import Image

from pipelines.cli import main
from schemas.samples import Sample
from tests.conftest import encode, photo
from tests.vlm_ops import tiny_captioners
from vlm_ops.enrich import decode_batch
from vlm_ops.images import preprocess
from vlm_ops.models import (
    Caption,
    ImageModel,
    describe_model,
    hf_caption_writing,
    load_image_backbone,
    load_image_model,
)
from vlm_ops.models.hf_captioners import is_captioner
from vlm_ops.models.settings import CPU, ModelSettings
from vlm_ops.ops import load_ops, plan_ops
from vlm_ops.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = list(tiny_captioners.FAMILIES)
CHAT = ("llava", "llava_next", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
# What makes one square of every image.
SQUARES = ("blip", "git", "vit_gpt2", "florence2", "blip2", "instructblip", "paligemma", "kosmos2", "llava", "gemma3")
QUESTION = "Describe this image in one plain sentence."
PROMPTS = {
    "florence2": "<CAPTION>",
    "instructblip": "A short image description:",
    "paligemma": "caption en",
    "kosmos2": "An image of",
    **dict.fromkeys(CHAT, QUESTION),
}
OTHER_PROMPTS = {
    "blip": "a photo of",
    "git": "a photo of",
    "florence2": "<MORE_DETAILED_CAPTION>",
    "blip2": "a short description of this image",
    "instructblip": "describe this image",
    "paligemma": "describe en",
    "kosmos2": "<grounding> an image of",
    **dict.fromkeys(CHAT, "what is on this image in one short sentence ?"),
}
PHOTOS = [photo(seed, 97 + 13 * seed, 80 - 9 * seed) for seed in range(3)] + [photo(3, 61, 150)]
_WRITING_PARTS = {"blip": "text_decoder", "blip2": "language_model", "instructblip": "language_model", "kosmos2": "text_model"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captioners")
    for name in FAMILIES:
        tiny_captioners.save(name, path / name)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, folder: Path) -> ImageModel:
    return load(folder / name, max_new_tokens=12)


def load(path: Path, settings: ModelSettings = CPU, **changed: Any) -> ImageModel:
    return load_image_model(f"hf:{path}", replace(settings, **changed))


def pixels_for(model: ImageModel, images: Sequence[Image.Image] = PHOTOS) -> Any:
    form = model.preprocessing
    pixels = [preprocess(torch.from_numpy(np.array(each)).permute(2, 0, 1), form).numpy() for each in images]
    return pixels if form.fit == "contain" else np.stack(pixels)


def captions_of(model: ImageModel, images: Sequence[Image.Image] = PHOTOS) -> list[Caption]:
    captions = model.encode_images(pixels_for(model, images)).captions
    assert captions is not None
    return list(captions)


def texts_of(model: ImageModel) -> list[str]:
    return [each.text for each in captions_of(model)]


def agree(actual: Sequence[Caption], expected: Sequence[Caption]) -> None:
    assert [each.text for each in actual] == [each.text for each in expected]
    assert [each.score for each in actual] == pytest.approx([each.score for each in expected], abs=1e-4)


# --- transformers, called by hand -----------------------------------------------------------------


def by_hand(path: Path, image: Image.Image, prompt: str | None, **how: Any) -> Caption:
    """One image at a time, as the documentation of each family shows it."""
    net, processor, tokenizer = parts_of(path)
    inputs = dict(inputs_by_hand(path.name, processor, image, prompt))
    output = net.generate(**inputs, do_sample=False, return_dict_in_generate=True, output_scores=True, **how)
    beams = getattr(output, "beam_indices", None)
    part = getattr(net, _WRITING_PARTS.get(path.name, ""), net)
    log_probs = part.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=beams is None)[
        0
    ]
    ids = output.sequences[0, -len(log_probs) :]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if path.name == "florence2":
        raw = tokenizer.decode(ids, skip_special_tokens=False)
        text = processor.post_process_generation(text=raw, task=prompt)[prompt].strip()
    if path.name == "kosmos2":
        text = processor.post_process_generation(text)[0]
    num_tokens = len(log_probs) if beams is None else int((beams[0] >= 0).sum())
    return Caption(" ".join(text.split()), "generated", float(log_probs[:num_tokens].mean().exp()))


@cache
def parts_of(path: Path) -> tuple[Any, Any, Any]:
    net = t.AutoModelForImageTextToText.from_pretrained(path).eval()
    if path.name == "vit_gpt2":
        return net, t.AutoImageProcessor.from_pretrained(path), t.AutoTokenizer.from_pretrained(path)
    processor = t.AutoProcessor.from_pretrained(path)
    return net, processor, processor.tokenizer


def inputs_by_hand(name: str, processor: Any, image: Image.Image, prompt: str | None) -> Any:
    if name in CHAT:
        asked = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        return processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    if prompt is None:
        return processor(images=image, return_tensors="pt")
    if name == "git":  # transformers' page on GIT, "visual question answering"
        ids = processor.tokenizer(prompt, add_special_tokens=False).input_ids
        ids = torch.tensor([[processor.tokenizer.cls_token_id, *ids]])
        return {"pixel_values": processor(images=image, return_tensors="pt").pixel_values, "input_ids": ids}
    text = f"<image>{prompt}" if name == "paligemma" else prompt
    inputs = dict(processor(images=image, text=text, return_tensors="pt"))
    return {key: value for key, value in inputs.items() if key != "labels"}


def test_captions_equal_transformers(name: str, folder: Path) -> None:
    expected = [by_hand(folder / name, image, PROMPTS.get(name), max_new_tokens=64 if name in CHAT else 40) for image in PHOTOS]  # fmt: skip
    actual = captions_of(load(folder / name))
    agree(actual, expected)
    assert len({each.text for each in actual}) >= 3 and all(0 < each.score < 1 for each in actual)
    assert all(each.source == "generated" for each in actual)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_settings_are_followed(name: str, folder: Path, num_beams: int) -> None:
    """An echo of the prompt would be in neither, and not in one alone."""
    prompt = OTHER_PROMPTS.get(name)
    how: dict[str, Any] = {"max_new_tokens": 9, "num_beams": num_beams}
    expected = [by_hand(folder / name, image, prompt, **how) for image in PHOTOS]
    agree(captions_of(load(folder / name, caption_prompt=prompt, **how)), expected)
    assert prompt is None or not any(each.text.startswith(prompt) for each in expected)


@pytest.mark.parametrize("name", [each for each in FAMILIES if each in OTHER_PROMPTS], indirect=True)
def test_another_prompt_gives_other_captions(name: str, folder: Path, model: ImageModel) -> None:
    other = load(folder / name, max_new_tokens=12, caption_prompt=OTHER_PROMPTS[name])
    assert texts_of(other) != texts_of(model)


def test_beams_change_captions(name: str, folder: Path) -> None:
    one, three = (captions_of(load(folder / name, max_new_tokens=12, num_beams=beams)) for beams in (1, 3))
    assert [each.score for each in one] != [each.score for each in three]


# --- the contract ---------------------------------------------------------------------------------


def test_description(name: str, folder: Path, model: ImageModel) -> None:
    info = describe_model(f"hf:{folder / name}")
    assert info == model.info and info.spec == f"hf:{folder / name}" and len(info.revision) == 12
    assert info.produces == {"caption"} and not info.encodes_text and list(model.label_names) == []
    told = {"caption_prompt"} if name in OTHER_PROMPTS else set()
    assert info.takes == {"max_new_tokens", "num_beams"} | told
    form = model.preprocessing
    assert (form.size, form.fit == "contain") == ((32, False) if name in SQUARES else (1024, True))


def test_threads_have_models_of_their_own_on_the_same_weights(folder: Path) -> None:
    """Since a Qwen-VL keeps the positions of the batch that it is writing about."""
    captioner: Any = load(folder / "qwen2_vl", max_new_tokens=2)

    def own() -> Any:
        captions_of(captioner)
        return captioner._own.model

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        models = [own(), one.submit(own).result(), other.submit(own).result()]
    assert len(set(map(id, models))) == 3 and all(each.model.rope_deltas is not None for each in models)
    weights = [{name: each.data_ptr() for name, each in model.named_parameters()} for model in models]
    assert weights[0] == weights[1] == weights[2]


def test_batches_beyond_what_a_cpu_takes_at_once(model: ImageModel) -> None:
    agree(captions_of(model, PHOTOS * 3), captions_of(model) * 3)


@pytest.mark.parametrize("name", SQUARES, indirect=True)
def test_squares_are_what_the_processor_makes(name: str, folder: Path, model: ImageModel) -> None:
    _, processor, _ = parts_of(folder / name)
    images = getattr(processor, "image_processor", processor)
    expected = [images(image, return_tensors="pt")["pixel_values"][0] for image in PHOTOS]
    made = model._squares.inputs(pixels_for(model), "cpu")["pixel_values"]  # type: ignore[attr-defined]
    torch.testing.assert_close(made, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_model_that_writes_nothing_gives_no_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op: Any = load_ops(plan_ops(["caption"], f"hf:{folder / 'blip'}"), CPU)[0]
    end = op.model._asked.processor.tokenizer.eos_token_id
    one = torch.full((1, 1), end), torch.zeros(1)
    monkeypatch.setattr(hf_caption_writing, "_written", lambda model, inputs, end_ids: one)
    samples = [Sample("u", "u", "k", encode(PHOTOS[0], "PNG"))]
    batch, _ = decode_batch(samples, [op.preprocessing], 10**8)
    columns = {name: array.to_pylist() for name, array in op(batch).items()}
    assert columns == {"caption": [None], "caption_source": [None], "caption_score": [None]}
    assert op.model.encode_images(batch.pixels[op.preprocessing]).captions == [Caption("", "generated", 1.0)]


def test_without_captions_no_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hf_caption_writing, "_load_model")
    model = load_image_model(f"hf:{folder / 'blip'}", CPU, frozenset())
    assert model.encode_images(pixels_for(model)).captions is None


def test_half_precision(folder: Path) -> None:
    model = load(folder / "blip", dtype="bfloat16", engine="torch", max_new_tokens=12)
    assert model._model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert all(each.text and 0 < each.score < 1 for each in captions_of(model))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_equals_the_cpu(name: str, folder: Path, model: ImageModel, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_cuda = load_image_model(f"hf:{folder / name}", ModelSettings("cuda", dtype, "torch", max_new_tokens=12))
    captions = captions_of(on_cuda)
    assert captions == captions_of(on_cuda)
    if dtype == "float32":
        same = [a.text == b.text for a, b in zip(captions, captions_of(model), strict=True)]
        assert sum(same) >= 3  # of two tokens that are equally likely it may take the other


# --- how captions are searched for ----------------------------------------------------------------


def copied(name: str, folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / name, tmp_path / name))


def edit(path: Path, **changed: Any) -> None:
    """Changes entries of a JSON file; None takes one away."""
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_the_models_own_settings_count_but_for_sampling(folder: Path, tmp_path: Path) -> None:
    path = copied("qwen2_vl", folder, tmp_path)
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 1000, "top_p": 0.1, "max_length": 20}
    edit(path / "generation_config.json", no_repeat_ngram_size=1, max_new_tokens=10, **sampling)
    model = load(path)
    captions = captions_of(model)
    assert captions == captions_of(model)
    # One by one: in a batch, what pads a question counts as said, and is not said again either.
    agree([captions_of(model, [image])[0] for image in PHOTOS], [by_hand(path, image, QUESTION) for image in PHOTOS])
    words = [each.text.split() for each in captions]
    assert all(len(set(each)) == len(each) <= 10 for each in words) and max(map(len, words)) == 10
    assert describe_model(f"hf:{path}").revision != describe_model(f"hf:{folder / 'qwen2_vl'}").revision


def test_only_one_line_without_special_tokens(folder: Path) -> None:
    asked = load(folder / "git")._asked  # type: ignore[attr-defined]
    ids = asked.processor.tokenizer.convert_tokens_to_ids(["<s>", "a", "dog", "</s>", "<pad>"])
    assert asked.texts(torch.tensor([ids])) == ["a dog"]
    asked.processor.tokenizer.add_tokens([" \n two\n cats\n"])
    assert asked.texts(torch.tensor([[ids[1], len(asked.processor.tokenizer) - 1]])) == ["a two cats"]


def test_nothing_is_printed(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        captions_of(load(folder / name, max_new_tokens=3))
    assert capfd.readouterr() == ("", "") and caplog.records == []


def test_compile_is_said_to_be_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(folder / "blip", engine="torch", compile=True)
    assert "--compile is left out for hf:" in caplog.text


# --- preprocessing --------------------------------------------------------------------------------


def test_another_filter_is_found(folder: Path, tmp_path: Path) -> None:
    path = copied("blip", folder, tmp_path)
    edit_image_processor(path, resample=2)
    assert load(path).preprocessing == Preprocessing(32, "stretch", 1.0, "bilinear", "floor")


@pytest.mark.parametrize(
    "changed", [{"resample": 1}, {"size": {"height": 32, "width": 48}}, {"size": {"longest_edge": 32}}]
)
def test_what_preprocess_cannot_do_is_left_to_the_processor(
    folder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    path = copied("blip", folder, tmp_path)
    edit_image_processor(path, **changed)
    assert load(path).preprocessing == Preprocessing(1024, "contain")


def edit_image_processor(path: Path, **changed: Any) -> None:
    values = json.loads((path / "processor_config.json").read_text())
    edit(path / "processor_config.json", image_processor={**values["image_processor"], **changed})


def test_large_images_are_shrunk_before_they_are_tiled(folder: Path) -> None:
    model = load(folder / "smolvlm", max_new_tokens=5)
    (pixels,) = pixels_for(model, [photo(0, 3000, 1500)])
    assert pixels.shape == (3, 512, 1024)
    assert len(model.encode_images([pixels]).captions or ()) == 1


# --- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit_gpt2", {"caption_prompt": "a"}, "cannot be told anything; leave out --caption_prompt 'a'"),
        (
            "florence2",
            {"caption_prompt": "<OD>"},
            "takes a task as --caption_prompt, not '<OD>'; use <CAPTION> or <DETA",
        ),
        ("llava", {"caption_prompt": " \n"}, "--caption_prompt is empty; leave it out"),
        ("blip", {"max_new_tokens": 64}, "--max_new_tokens 64 does not fit captioner .* which has 64 positions"),
        ("vit_gpt2", {"max_new_tokens": 64}, "which has 64 positions"),
        ("qwen2_vl", {"max_new_tokens": 4000}, "which has 2048 positions"),
        (
            "git",
            {"dtype": "int8", "engine": "onnxruntime"},
            "--dtype int8 is for image and text towers; captioner 'hf:",
        ),
    ],
)
def test_settings_that_cannot_be_followed(name: str, settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        describe_model(f"hf:{folder / name}", replace(CPU, **settings))


def test_chat_without_a_template(folder: Path, tmp_path: Path) -> None:
    path = copied("llava", folder, tmp_path)
    (path / "chat_template.jinja").unlink()
    message = "has no chat template.*--caption_prompt 'USER: <image>"
    with pytest.raises(ValueError, match=message):
        describe_model(f"hf:{path}")
    with pytest.raises(ValueError, match=message):
        load(path, caption_prompt="Describe this.")
    # What the template would have made is taken as it is.
    whole = f"<s>user : <image> {QUESTION} assistant :"
    actual, expected = load(path, caption_prompt=whole, max_new_tokens=12), load(folder / "llava", max_new_tokens=12)
    agree(captions_of(actual), captions_of(expected))


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("blip", ["processor_config.json"], "has no processor .*save the one it was trained with there"),
        ("vit_gpt2", ["preprocessor_config.json"], "has no processor"),
        ("vit_gpt2", ["tokenizer.json", "tokenizer_config.json"], "has no tokenizer .tokenizer.json."),
        ("llava", ["tokenizer.json", "tokenizer_config.json"], "has no tokenizer .tokenizer.json."),
        ("blip", ["model.safetensors"], "has no weights: there is no model.safetensors"),
    ],
)
def test_missing_files(name: str, missing: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    path = copied(name, folder, tmp_path)
    for each in missing:
        (path / each).unlink()
    with pytest.raises(ValueError, match=message):
        load(path)


def test_missing_weights_and_packages(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("blip", folder, tmp_path)
    net = t.AutoModelForImageTextToText.from_pretrained(path)
    state = {key: value for key, value in net.state_dict().items() if "vision_model.post_layernorm" not in key}
    net.save_pretrained(path, state_dict=state)
    with pytest.raises(ValueError, match="lack vision_model.post_layernorm.bias, .*; save the whole model there"):
        load(path)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(ValueError, match="cannot be loaded: .*num2words.*pip install"):
        load(folder / "smolvlm")


def test_code_of_a_repository(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = copied("smolvlm", folder, tmp_path)
    own = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    edit(path / "config.json", model_type="someones_vlm", auto_map=own)
    (path / "code.py").write_text(
        "from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration\n"
        "class Config(SmolVLMConfig):\n    model_type = 'someones_vlm'\n"
        "class Model(SmolVLMForConditionalGeneration):\n    config_class = Config\n"
    )
    with pytest.raises(ValueError, match="runs code that lies in its repository; .*--trust_remote_code"):
        describe_model(f"hf:{path}")
    trusted = load(path, trust_remote_code=True, max_new_tokens=5)
    assert texts_of(trusted) == texts_of(load(folder / "smolvlm", max_new_tokens=5))
    path = copied("florence2", folder, tmp_path)
    edit(
        path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"}
    )
    with pytest.raises(ValueError, match="name its conversion, such as hf:florence-community/Florence-2-base"):
        describe_model(f"hf:{path}")


def test_what_is_a_captioner() -> None:
    vision: dict[str, Any] = {"vision_config": {}}
    assert is_captioner({"architectures": ["BlipForConditionalGeneration"], "model_type": "blip", **vision})
    assert is_captioner({"architectures": ["VisionEncoderDecoderModel"], "model_type": "vision-encoder-decoder"})
    assert not is_captioner({"architectures": ["BlipForImageTextRetrieval"], "model_type": "blip", **vision})
    assert not is_captioner({"architectures": ["CLIPModel"], "model_type": "clip", **vision})
    assert not is_captioner({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"})
    assert not is_captioner({"model_type": "vit"})


def test_a_captioner_is_no_backbone(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a captioner, whose image side does not stand alone"):
        load_image_backbone(f"hf:{folder / 'blip'}")
    with pytest.raises(ValueError, match="cannot serve op 'embedding'"):
        plan_ops(["embedding"], f"hf:{folder / 'blip'}")


# --- build ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["git", "smolvlm"])
def test_build_captions_by_a_model(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(PHOTOS):
        image.save(tmp_path / "photos" / f"{number}.png")
    catalog, spec = tmp_path / "catalog", f"hf:{folder / name}"
    arguments = ["build", "--input", str(tmp_path / "photos"), "--catalog", str(catalog), "--ops", "caption"]
    told = ["--caption_prompt", OTHER_PROMPTS[name], "--max_new_tokens", "9", "--num_beams", "2"]
    assert main([*arguments, "--caption_model", spec, *told]) == 0
    rows = sorted(DeltaTable(str(catalog / "images")).to_pyarrow_table().to_pylist(), key=lambda row: row["key"])
    how: dict[str, Any] = {"max_new_tokens": 9, "num_beams": 2}
    expected = [by_hand(folder / name, image, OTHER_PROMPTS[name], **how) for image in PHOTOS]
    agree([Caption(row["caption"], row["caption_source"], row["caption_score"]) for row in rows], expected)
    capsys.readouterr()
    assert main([*arguments, "--caption_model", spec.replace(name, "vit_gpt2"), *told]) == 2
    assert "cannot be told anything" in capsys.readouterr().err
