"""Writers on language models of transformers: tiny ones, made here with random weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from vlm_ops.models.captioner import Captioner
from vlm_ops.models.language_model import (
    CrossAttentionConfig,
    CrossAttentionWriter,
    VisionEncoderDecoderWriter,
    describe_writer,
    load_language_model,
    load_vision_encoder_decoder,
    save_tokenizer,
    writer_from,
)

CAPTIONS = (
    "a dog runs",
    "a dog runs on the beach",
    "two dogs sleep",
    "a child eats a red apple at a table",
    "a red bus",
    "two children on a bus",
    "a cat sleeps on a red table",
    "an old man with an apple and a cat",
)
SHAPES = CrossAttentionConfig(feature_dim=16, grid_dim=12, embedding_dim=8, num_cells=9, max_tokens=20)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: byte-level BPE with one sign for start, end and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    sign = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=sign, eos_token=sign, pad_token=sign)


def save_language_model(path: Path, model: Any = GPT2LMHeadModel, config: Any = None) -> str:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    model(config or gpt2_config(len(tokenizer))).save_pretrained(path)
    return f"hf:{path}"


def gpt2_config(vocab_size: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )


def save_image_encoder(path: Path, model: Any = ViTModel, config: Any = None) -> str:
    config = config or ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model(config).save_pretrained(path)
    save_image_processor(path)
    return f"hf:{path}"


def save_image_processor(path: Path) -> None:
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(path)


def make_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Eight "photos": noise, but each its own."""
    generator = torch.Generator().manual_seed(seed)
    n = len(CAPTIONS)
    return {
        "features": 5 + 3 * torch.randn(n, 16, generator=generator),
        "grid": torch.randn(n, 9, 12, generator=generator).half(),
        "embedding": torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=-1),
        "pixels": torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8),
    }


def make_cross_attention_writer(path: Path) -> CrossAttentionWriter:
    writer = CrossAttentionWriter(SHAPES, *load_language_model(save_language_model(path / "gpt2")))
    writer.standardise_by(make_inputs()["features"])
    return writer


def make_vision_encoder_decoder_writer(path: Path) -> VisionEncoderDecoderWriter:
    image_encoder = save_image_encoder(path / "vit")
    return load_vision_encoder_decoder(image_encoder, save_language_model(path / "gpt2"))


def train(writer: Any, num_steps: int, seed: int = 0) -> None:
    inputs, captions = make_inputs(seed), [[caption] for caption in CAPTIONS]
    optimizer = torch.optim.AdamW(writer.parameters(), lr=3e-3, weight_decay=0.0)
    writer.train()
    for _ in range(num_steps):
        loss = writer.loss(inputs, captions, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(writer.parameters(), 1.0)
        optimizer.step()
    writer.eval()


def greedy(writer: Any, inputs: Mapping[str, torch.Tensor]) -> list[str]:
    return [hypotheses[0].text for hypotheses in writer.write(inputs, num_beams=1)]


MAKERS = {"cross-attention": make_cross_attention_writer, "vision-encoder-decoder": make_vision_encoder_decoder_writer}
Make = Callable[[Path], Any]


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Make:
    torch.manual_seed(0)
    return MAKERS[request.param]


@pytest.fixture(scope="module", params=list(MAKERS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    writer = MAKERS[request.param](tmp_path_factory.mktemp("trained"))
    train(writer, num_steps=150)
    return writer


def test_learns_eight_photos_by_heart(trained: Any) -> None:
    assert greedy(trained, make_inputs()) == list(CAPTIONS)


def test_the_cache_changes_nothing(make: Make, tmp_path: Path) -> None:
    writer = make(tmp_path)
    train(writer, num_steps=15)  # half learnt: sentences of all lengths, and some without an end
    inputs = make_inputs()
    n = len(CAPTIONS)
    ids, ended = torch.zeros(n, 1, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
    total, length = torch.zeros(n), torch.zeros(n)
    with torch.no_grad():
        memory = writer.memory(inputs)
        for _ in range(writer.max_tokens + 1):
            logits = writer.language_model(ids, encoder_hidden_states=memory, use_cache=False).logits[:, -1]
            best, chosen = logits.log_softmax(-1).max(-1)
            total, length = total + best * ~ended, length + (~ended).float()
            ids = torch.cat([ids, chosen.masked_fill(ended, 0)[:, None]], dim=1)
            ended = ended | (chosen == 0)
    expected = writer.tokenizer.batch_decode(ids, skip_special_tokens=True)

    actual = writer.write(inputs, num_beams=1)

    assert [hypotheses[0].text for hypotheses in actual] == [text.strip() for text in expected]
    log_probs = torch.tensor([hypotheses[0].log_prob for hypotheses in actual])
    torch.testing.assert_close(log_probs, total / length, rtol=1e-4, atol=1e-5)
    assert len(set(length.tolist())) > 1


def test_beam_search_finds_nothing_worse_than_greedy_decoding(make: Make, tmp_path: Path) -> None:
    writer = make(tmp_path)
    train(writer, num_steps=40)
    inputs = make_inputs()

    beams = writer.write(inputs, num_beams=4)
    assert [len(each) for each in writer.write(inputs, num_beams=4, num_wanted=2)] == [2] * len(beams)

    assert [len(hypotheses) for hypotheses in beams] == [4] * len(CAPTIONS)
    for hypotheses, (alone,) in zip(beams, writer.write(inputs, num_beams=1), strict=True):
        log_probs = [hypothesis.log_prob for hypothesis in hypotheses]
        assert log_probs == sorted(log_probs, reverse=True)
        assert log_probs[0] >= alone.log_prob - 1e-5
        assert len({hypothesis.text for hypothesis in hypotheses}) > 1


def test_scores_are_those_of_the_sentences(trained: Any) -> None:
    """Of a beam search as of greedy decoding: minus the loss on what was written."""
    inputs = make_inputs()
    for num_beams in (1, 3):
        for row, hypotheses in enumerate(trained.write(inputs, num_beams)):
            one = {name: values[row : row + 1] for name, values in inputs.items()}
            with torch.no_grad():
                loss = trained.loss(one, [[hypotheses[0].text]], label_smoothing=0.0)
            assert hypotheses[0].log_prob == pytest.approx(-loss.item(), abs=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_images_are_searched_apart_where_memory_is_short(
    trained: Any, num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained.write(make_inputs(), num_beams)
    monkeypatch.setattr("vlm_ops.models.language_model._SCORES", 1)
    apart = trained.write(make_inputs(), num_beams)
    assert [[each.text for each in row] for row in apart] == [[each.text for each in row] for row in together]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_rebuilt_from_a_directory_of_its_own(trained: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = save({name: tensor.to(dtype) for name, tensor in Captioner(trained).state_dict().items()})
    description = json.dumps(describe_writer(trained))
    save_tokenizer(trained, tmp_path)

    rebuilt = Captioner(writer_from(json.loads(description), tmp_path))
    assert greedy(rebuilt.eval(), make_inputs()) != list(CAPTIONS)
    rebuilt.load_state_dict({name: tensor.float() for name, tensor in load(weights).items()})

    assert greedy(rebuilt, make_inputs()) == list(CAPTIONS)
    assert str(tmp_path.parent) not in description
    assert describe_writer(rebuilt.writer) == describe_writer(trained)
    for hypotheses, expected in zip(rebuilt.write(make_inputs(), 2), trained.write(make_inputs(), 2), strict=True):
        assert hypotheses[0].log_prob == pytest.approx(expected[0].log_prob, abs=1e-2)


def test_averaged_weights_stay_tied(make: Make, tmp_path: Path) -> None:
    """As the training loop averages them, and writes and reads its checkpoint."""
    captioner = Captioner(make(tmp_path))
    averaged = AveragedModel(captioner, use_buffers=False)
    averaged.update_parameters(captioner)
    state = averaged.state_dict()
    assert "module.writer.language_model.lm_head.weight" not in state
    averaged.load_state_dict(state)
    model = averaged.module.writer.language_model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_tied_weights_are_saved_once_and_stay_tied(make: Make, tmp_path: Path) -> None:
    writer = make(tmp_path)
    model = writer.language_model
    assert model.lm_head.weight is model.transformer.wte.weight
    state = writer.state_dict()
    assert "language_model.transformer.wte.weight" in state and "language_model.lm_head.weight" not in state
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)

    save_tokenizer(writer, tmp_path)
    rebuilt = writer_from(describe_writer(writer), tmp_path)
    rebuilt.load_state_dict(state)

    model = rebuilt.language_model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, state["language_model.transformer.wte.weight"])


def test_a_checkpoint_whose_matrices_differ_stays_untied(tmp_path: Path) -> None:
    """Whatever its configuration says."""
    path = tmp_path / "gpt2"
    spec = save_language_model(path)
    weights = load((path / "model.safetensors").read_bytes())
    weights["lm_head.weight"] = torch.randn_like(weights["transformer.wte.weight"])
    (path / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))

    writer = CrossAttentionWriter(SHAPES, *load_language_model(spec))
    save_tokenizer(writer, tmp_path)
    rebuilt = writer_from(describe_writer(writer), tmp_path)
    rebuilt.load_state_dict(writer.state_dict())

    assert torch.equal(rebuilt.language_model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(rebuilt.language_model.transformer.wte.weight, weights["transformer.wte.weight"])


def test_padding_does_not_leak_into_the_loss(make: Make, tmp_path: Path) -> None:
    writer = make(tmp_path).eval()
    inputs = make_inputs()
    captions = [[CAPTIONS[row], CAPTIONS[-1 - row]] for row in range(len(CAPTIONS))]

    together = writer.loss(inputs, captions, label_smoothing=0.1)

    losses, lengths = [], []
    for row, texts in enumerate(captions):
        one = {name: values[row : row + 1] for name, values in inputs.items()}
        for text in texts:
            losses.append(writer.loss(one, [[text]], label_smoothing=0.1))
            lengths.append(len(writer.tokenizer(text)["input_ids"]) + 1.0)  # and the end
    weights = torch.tensor(lengths)
    assert weights.unique().numel() > 3
    torch.testing.assert_close(together, (torch.stack(losses) * weights).sum() / weights.sum())


def test_every_part_learns(make: Make, tmp_path: Path) -> None:
    writer = make(tmp_path)
    writer.loss(make_inputs(), [[caption] for caption in CAPTIONS], 0.1).backward()
    assert [name for name, parameter in writer.named_parameters() if parameter.grad is None] == []


def test_nothing_is_printed(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    writer = make(tmp_path).eval()
    logger = logging.getLogger("transformers")  # does not propagate
    logger.addHandler(caplog.handler)
    capfd.readouterr()
    try:
        writer.write(make_inputs(), num_beams=3)
        writer.write(make_inputs(), num_beams=1)
        save_tokenizer(writer, tmp_path)
        writer_from(describe_writer(writer), tmp_path)
        load_language_model(f"hf:{tmp_path / 'gpt2'}")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_no_images_have_no_sentences(make: Make, tmp_path: Path) -> None:
    nothing = {name: values[:0] for name, values in make_inputs().items()}
    assert make(tmp_path).write(nothing, num_beams=3) == []


def test_long_captions_are_cut(make: Make, tmp_path: Path) -> None:
    writer = make(tmp_path)
    ids, real = writer.encode(["a " * 100, ""])
    assert ids.shape == (2, writer.max_tokens + 2)
    assert real.sum(1).tolist() == [writer.max_tokens + 2, 2]
    assert ids[1].tolist() == [0] * (writer.max_tokens + 2)  # start, end and padding are one sign


def test_settings_of_the_directory_do_not_change_the_search(tmp_path: Path) -> None:
    spec = save_language_model(tmp_path)
    settings = {"do_sample": True, "temperature": 9.0, "max_length": 2, "min_new_tokens": 9, "eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    writer = CrossAttentionWriter(SHAPES, *load_language_model(spec))
    train(writer, num_steps=80)
    assert greedy(writer, make_inputs()) == greedy(writer, make_inputs())
    assert "a dog runs" in greedy(writer, make_inputs())


def test_a_writer_without_an_embedding(tmp_path: Path) -> None:
    shapes = CrossAttentionConfig(feature_dim=16, grid_dim=12, embedding_dim=0, num_cells=9)
    writer = CrossAttentionWriter(shapes, *load_language_model(save_language_model(tmp_path)))
    inputs = make_inputs()
    assert writer.memory(inputs).shape == (len(CAPTIONS), 10, 48)
    assert len(writer.write({name: inputs[name] for name in ("features", "grid")}, 2)) == len(CAPTIONS)


def test_a_vision_encoder_decoder_is_read_from_one_directory(tmp_path: Path) -> None:
    """As it lies on the hub: its start sign is its own, and its pooler may be missing."""
    save_image_encoder(tmp_path / "vit")
    spec = save_language_model(tmp_path / "both")  # of which the tokenizer stays
    language_model, _ = load_language_model(spec)
    model = VisionEncoderDecoderModel(encoder=ViTModel.from_pretrained(tmp_path / "vit"), decoder=language_model)
    model.generation_config.decoder_start_token_id = 7
    model.save_pretrained(tmp_path / "both")
    save_image_processor(tmp_path / "both")

    writer = load_vision_encoder_decoder(spec)

    assert writer.start_id == 7 and writer.end_id == 0
    assert writer.preprocessing.size == 32
    pixels = make_inputs()["pixels"]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    ids = torch.tensor([[7, 5, 9]] * len(pixels))
    expected = model.eval()(pixel_values=(pixels / 255 - mean) / std, decoder_input_ids=ids).logits
    actual = writer.language_model(ids, encoder_hidden_states=writer.memory({"pixels": pixels})).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    save_tokenizer(writer, tmp_path)
    assert writer_from(describe_writer(writer), tmp_path).start_id == 7


def test_the_pretrained_weights_are_taken_over(tmp_path: Path) -> None:
    writer = make_vision_encoder_decoder_writer(tmp_path)
    assert Captioner(writer).backbones == [writer.image_encoder]
    image_encoder = ViTModel.from_pretrained(tmp_path / "vit").state_dict()
    for name, tensor in writer.image_encoder.state_dict().items():
        assert torch.equal(tensor, image_encoder[name]), name
    language_model = writer.language_model.state_dict()
    for name, tensor in GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").state_dict().items():
        assert torch.equal(tensor, language_model[name]), name


def test_another_language_model_with_signs_of_its_own(tmp_path: Path) -> None:
    """BERT as a decoder: captions stand between its [CLS] and [SEP], and its padding is another sign."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in CAPTIONS for word in text.split()})]
    words = models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(tmp_path)
    BertLMHeadModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            is_decoder=True,
        )
    ).save_pretrained(tmp_path)
    writer = CrossAttentionWriter(SHAPES, *load_language_model(f"hf:{tmp_path}"))
    assert (writer.start_id, writer.end_id) == (2, 3)

    train(writer, num_steps=150)

    assert greedy(writer, make_inputs()) == list(CAPTIONS)


def test_wrong_specs_are_told(tmp_path: Path) -> None:
    gpt2, vit = save_language_model(tmp_path / "gpt2"), save_image_encoder(tmp_path / "vit")
    with pytest.raises(ValueError, match="no model 'hf:/nowhere'.*give the path of a model's directory"):
        load_language_model("hf:/nowhere")
    with pytest.raises(ValueError, match="'compact' is no model of transformers; use hf:PATH"):
        load_language_model("compact")
    with pytest.raises(
        ValueError, match="a 'vit' is no causal language model with cross-attention; .* such as a GPT-2"
    ):
        load_language_model(vit)
    with pytest.raises(ValueError, match="'.*gpt2' is a 'gpt2': name a language model"):
        load_vision_encoder_decoder(gpt2)
    with pytest.raises(ValueError, match="gpt2"):
        load_vision_encoder_decoder(gpt2, gpt2)


def test_a_language_model_without_cross_attention_is_refused(tmp_path: Path) -> None:
    llama = LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    spec = save_language_model(tmp_path / "llama", LlamaForCausalLM, llama)
    with pytest.raises(ValueError, match="cannot read images: a 'llama' is no causal language model with cross-att"):
        load_language_model(spec)
    with pytest.raises(ValueError, match="GPT2LMHeadModel was made without cross-attention.*load_language_model"):
        CrossAttentionWriter(SHAPES, GPT2LMHeadModel(gpt2_config(300)), make_tokenizer())


def test_an_image_encoder_without_tokens_is_refused(tmp_path: Path) -> None:
    gpt2 = save_language_model(tmp_path / "gpt2")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    resnet = save_image_encoder(tmp_path / "resnet", ResNetModel, config)
    with pytest.raises(ValueError, match="is a 'resnet', which gives no tokens; name a vision transformer"):
        load_vision_encoder_decoder(resnet, gpt2)
    vit = save_image_encoder(
        tmp_path / "vit",
        ViTModel,
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=48,
            patch_size=8,
        ),
    )
    with pytest.raises(ValueError, match="48"):
        load_vision_encoder_decoder(vit, gpt2)


def test_missing_files_are_told(tmp_path: Path) -> None:
    spec = save_language_model(tmp_path)
    weights = load((tmp_path / "model.safetensors").read_bytes())
    del weights["transformer.h.1.mlp.c_fc.weight"]
    (tmp_path / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    with pytest.raises(ValueError, match="lack transformer.h.1.mlp.c_fc.weight; save the whole model"):
        load_language_model(spec)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights that can be read"):
        load_language_model(spec)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"there is no tokenizer in '.*' \(tokenizer.json\); save the model's own"):
        load_language_model(spec)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = gpt2_config(200)
    config.add_cross_attention = True
    with pytest.raises(ValueError, match="ids up to .* but the language model knows 200 tokens"):
        CrossAttentionWriter(SHAPES, GPT2LMHeadModel(config), tokenizer)
    config.vocab_size, config.n_positions = 300, 16
    with pytest.raises(ValueError, match="captions of 20 tokens do not fit the 16 positions.*at most 14"):
        CrossAttentionWriter(SHAPES, GPT2LMHeadModel(config), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token, so no caption would end"):
        CrossAttentionWriter(SHAPES, GPT2LMHeadModel(config), tokenizer)


def test_unknown_descriptions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind of writer 'parrot'; known are 'cross-attention'"):
        writer_from({"kind": "parrot"}, tmp_path)
