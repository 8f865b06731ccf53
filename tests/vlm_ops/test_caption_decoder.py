"""The compact decoder: its cache of keys and values, its beams, its vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch

from vlm_ops.models.caption_decoder import _COLOR_WEIGHT, CaptionDecoder, DecoderConfig, Vocabulary, split_words
from vlm_ops.models.decoder_engine import DecoderEngine

WORDS = ("a", "dog", "runs")
RUNS = 6  # the number of the one word that is too long to be said twice


COLORED = ("a", "blue", "dog", "red", "runs")


def decoder(max_words: int = 4, seed: int = 0, words: tuple[str, ...] = WORDS) -> CaptionDecoder:
    torch.manual_seed(seed)
    config = DecoderConfig(5, 6, 3, 4, words, width=16, num_heads=2, dropout=0.0, max_words=max_words, color_dim=4)
    made = CaptionDecoder(config).eval()
    with torch.no_grad():  # far from uniform, so that ties are out of the question
        made.embedding.weight.normal_(std=0.7)
        made.bias.normal_(std=0.5)
    return made


def inputs(n: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(n, 5, generator=generator),
        "grid": torch.rand(n, 4, 6, generator=generator),
        "embedding": torch.randn(n, 3, generator=generator),
    }


@torch.no_grad()
def score_of(model: CaptionDecoder, images: dict[str, torch.Tensor], row: int, ids: list[int]) -> float:
    """Length-normalised log-probability of a sentence, without any cache."""
    one = {name: values[row : row + 1] for name, values in images.items()}
    sentence = torch.tensor([[[Vocabulary.BEGIN, *ids]]])
    logits = model(one, sentence[:, :, :-1])
    log_probs = logits.log_softmax(-1)[0, 0].gather(1, sentence[0, 0, 1:, None]).sum()
    return float(log_probs) / len(ids) ** 0.8


@pytest.mark.parametrize("seed", range(3))
def test_beams_as_wide_as_the_language_find_its_best_sentences(seed: int) -> None:
    model, images = decoder(max_words=3, seed=seed), inputs()
    sentences = [
        [*words, Vocabulary.END]
        for length in range(4)
        for words in itertools.product((4, 5, 6), repeat=length)
        if words.count(RUNS) < 2
    ]
    written = model.write(images, num_beams=60)
    for row in range(3):
        expected = sorted(
            ((score_of(model, images, row, ids), model.vocabulary.decode(ids)) for ids in sentences), reverse=True
        )
        assert [each.text for each in written[row][:5]] == [text for _, text in expected[:5]]
        assert [each.log_prob for each in written[row][:5]] == pytest.approx([s for s, _ in expected[:5]], abs=1e-4)


def test_one_beam_is_greedy() -> None:
    model, images = decoder(max_words=6), inputs(5)
    for row, hypotheses in enumerate(model.write(images, num_beams=1)):
        ids = [Vocabulary.BEGIN]
        one = {name: values[row : row + 1] for name, values in images.items()}
        while len(ids) <= 6 and ids[-1] != Vocabulary.END:
            logits = model(one, torch.tensor([[ids]]))[0, 0, -1]
            logits[[Vocabulary.PAD, Vocabulary.BEGIN, Vocabulary.UNKNOWN]] = -torch.inf
            logits[RUNS] = -torch.inf if RUNS in ids else logits[RUNS]
            ids.append(int(logits.argmax()))
        assert hypotheses[0].text == model.vocabulary.decode(ids[1:])


def test_no_longer_word_is_said_twice() -> None:
    model, images = decoder(max_words=6), inputs(20)
    with torch.no_grad():
        model.bias[4:] += 5.0  # the sentences go on and on
    words = [each.text.split() for hypotheses in model.write(images, num_beams=4) for each in hypotheses]
    assert max(each.count("runs") for each in words) == 1
    assert max(each.count("dog") for each in words) > 1


@pytest.mark.parametrize("num_wanted", [None, 2])
def test_an_image_is_described_alike_alone_and_in_a_batch(num_wanted: int | None) -> None:
    model, images = decoder(max_words=6), inputs(6)
    together = model.write(images, 3, num_wanted)
    for row in range(6):
        alone = model.write({name: values[row : row + 1] for name, values in images.items()}, 3, num_wanted)[0]
        assert [each.text for each in alone] == [each.text for each in together[row]]
    assert model.write({name: values[:0] for name, values in images.items()}, 3, num_wanted) == []


def test_a_search_is_over_when_the_sentences_that_are_wanted_have_ended() -> None:
    model, images = decoder(max_words=10, seed=1), inputs(30)
    with torch.no_grad():
        model.bias[Vocabulary.END] += 1.0  # of some images, the shortest sentence is the best
    counts = []
    for row, hypotheses in enumerate(model.write(images, num_beams=5, num_wanted=1)):
        scores = [each.log_prob for each in hypotheses]
        assert hypotheses and scores == sorted(scores, reverse=True)
        counts.append(len(hypotheses))
        for each in hypotheses:  # the end is counted: none was cut short
            ids = [*model.vocabulary.encode(each.text), Vocabulary.END]
            assert each.log_prob == pytest.approx(score_of(model, images, row, ids), abs=1e-4)
    assert min(counts) < 5 == max(counts)
    assert {len(hypotheses) for hypotheses in model.write(images, num_beams=5)} == {5}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_onnx_runtime_writes_what_torch_writes(
    num_beams: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "decoder"))  # both cases share a graph
    model, images = decoder(max_words=6, words=COLORED), inputs(5)
    engine = DecoderEngine(model, "decoder")
    assert "runs through torch" not in caplog.text
    written, expected = engine.write(images, num_beams, 2), model.write(images, num_beams, 2)
    assert [[each.text for each in row] for row in written] == [[each.text for each in row] for row in expected]
    scores = [each.log_prob for row in written for each in row]
    assert scores == pytest.approx([each.log_prob for row in expected for each in row], abs=1e-4)
    assert engine.write({name: values[:0] for name, values in images.items()}, num_beams) == []


def test_sentences_of_one_image_do_not_see_each_other() -> None:
    model, images = decoder(), inputs(2)
    ids = model.encode([["a dog", "dog runs a"], ["runs", "a"]])
    together = model.log_probs(images, ids)
    for sentence in range(2):
        torch.testing.assert_close(
            model.log_probs(images, ids[:, sentence : sentence + 1])[:, 0], together[:, sentence]
        )


def test_colours_are_learnt_from_the_cells_that_have_them_and_read_by_the_writer() -> None:
    """A thing's colour stands in one cell of four, on a ground of any colour; no sentence teaches which."""
    model = decoder(words=COLORED)
    assert model.config.colors == ["blue", "red"] and model.config.num_tokens == 4 + 3
    images = inputs(64)
    rows, thing = torch.arange(64), torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(2))
    images["grid"][:, :, 0] = 0.0
    images["grid"][rows, thing, 0] = 3.0
    red = rows % 2 == 0
    images["grid"][rows, thing, 5] = red.float()
    captions = [["a red dog runs" if each else "a blue dog", "a dog"] for each in red]
    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        model.color_loss(images, captions, 0.0).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert model.color_namer is not None
    named = model.eval().color_namer(torch.log1p(images["grid"])).argmax(1) == 1
    assert (named == red).float().mean() > 0.9
    optimizer.zero_grad()
    memory = model.memory(images)
    assert memory.shape == (64, 7, 16)
    memory.pow(2).sum().backward()
    assert model.from_colors is not None and model.from_colors.weight.grad.any()  # type: ignore[union-attr]
    assert all(each.grad is None for each in model.color_namer.parameters())


def test_colours_say_which_colour_and_not_whether_one() -> None:
    model, images = decoder(words=COLORED), inputs()
    ids = model.encode([["a red dog"], ["red runs"], ["a dog"]])
    with torch.no_grad():
        seen = model.color_namer(torch.log1p(images["grid"])).log_softmax(1)  # type: ignore[misc]
        plain = model(images, ids[:, :, :-1]).softmax(-1)[:, 0]
        steps, past, read = [], model._no_past(3, 1), model.read(images)
        for position in range(ids.shape[2] - 1):
            log_probs, past = model.step(read, past, ids[:, :, position], torch.tensor([position]))
            steps.append(log_probs[:, 0].exp())
        colored = torch.stack(steps, dim=1)
        blue, red = model.color_ids.tolist()
        others = [word for word in range(len(model.vocabulary)) if word not in (blue, red)]
        torch.testing.assert_close(colored[..., others], plain[..., others])
        torch.testing.assert_close(colored.sum(2), torch.ones(3, 4))
        ratio = plain[..., red] / plain[..., blue] * (seen[:, 1] - seen[:, 0]).exp()[:, None] ** _COLOR_WEIGHT
        torch.testing.assert_close(colored[..., red] / colored[..., blue], ratio, rtol=1e-4, atol=0)
        expected = colored.log().gather(2, ids[:, 0, 1:, None])[..., 0] * (ids[:, 0, 1:] != Vocabulary.PAD)
        torch.testing.assert_close(model.log_probs(images, ids)[:, 0], expected.sum(1))


def test_without_colours_there_is_nothing_to_name() -> None:
    """Neither in captions that name none, nor in a vocabulary, nor in a model of before."""
    model, images = decoder(words=COLORED), inputs()
    assert model.color_loss(images, [["a dog"]] * 3, 0.1) == 0.0
    assert decoder().color_namer is None and decoder().config.num_tokens == 4 + 2
    assert CaptionDecoder(DecoderConfig(5, 6, 3, 4, COLORED, width=16, num_heads=2)).color_namer is None


def test_the_vocabulary() -> None:
    vocabulary = Vocabulary.of(["A dog runs.", "a man's dog", "a cat"], min_count=2)
    assert vocabulary.words[4:] == ("a", "dog")
    assert vocabulary.encode("A DOG, flies") == [4, 5, Vocabulary.UNKNOWN]
    assert vocabulary.decode([4, 5, Vocabulary.END, 4]) == "a dog"
    assert split_words("a man 's hat") == ["a", "man's", "hat"]
    assert split_words("Two boys' T-shirts, a man's; 'red'!") == ["two", "boys'", "t-shirts", "a", "man's", "red"]
