"""`beamsight train` on coloured pictures: every kind of model, what it must keep, and `dir:` as a model everywhere."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from deltalake import DeltaTable
from PIL import Image
from safetensors.torch import load_file

from pipelines.cli import main
from tests.conftest import encode, tar_bytes
from tests.vlm_ops.test_language_model import save_image_encoder, save_language_model
from vlm_ops.models import describe_model, load_image_backbone, load_image_model, load_text_model, load_tokenizer
from vlm_ops.models.directory import ModelDirectory
from vlm_ops.models.dual_encoder import DualEncoder, HeadsConfig
from vlm_ops.models.settings import CPU
from vlm_ops.models.writers import writer_from
from vlm_ops.sentences import class_sentence
from vlm_ops.training import loop

pytestmark = pytest.mark.usefixtures("own_cache")

TOY = "python:tests.toys"
# Words that the toy text model does not know: it can only learn them.
WORDS = {"crimson": (230, 20, 30), "lime": (60, 240, 40), "navy": (20, 30, 180), "lemon": (240, 230, 40)}
FILES = {"README.md", "config.json", "curves.svg", "model.safetensors"}
KINDS = ("dual-encoder", "captioner", "matcher")
# Little of everything that could differ between two runs.
SHORT = ["--epochs", "4", "--images_per_step", "16", "--hidden_dim", "16", "--dropout", "0.3", "--averaging", "0.9",
         "--mirrored"]  # fmt: skip
SHORT_OF = {
    "dual-encoder": [*SHORT, "--mixing", "0.5"],
    "captioner": [*SHORT, "--min_word_count", "1"],
    "matcher": SHORT,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.tar` and `val.tar`, and `bare.tar` with metadata alone."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 12), ("bare", 12)):
        members = []
        for number in range(count):
            word, color = list(WORDS.items())[number % 4]
            shade = tuple(int(v) for v in np.clip(np.array(color) + rng.integers(-20, 20, 3), 0, 255))
            beside = {"label": word} if name == "bare" else {"caption": f"{word} thing", "label": word}
            members.append((f"{number:03}.png", encode(Image.new("RGB", (16, 16), shade), "PNG")))
            members.append((f"{number:03}.json", json.dumps(beside).encode()))
        (folder / f"{name}.tar").write_bytes(tar_bytes(members))
    return folder


def train(corpus: Path, output: Path | str, *flags: str, kind: str = "dual-encoder", model: str = TOY) -> int:
    inputs = ["--input", str(corpus / "train.tar"), "--validation", str(corpus / "val.tar"), "--output", str(output)]
    machine = ["--device", "cpu", "--num_threads", "1", "--dtype", "float32"]
    return main(["train", kind, *inputs, "--model", model, *machine, *flags])


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual encoder."""
    output = tmp_path_factory.mktemp("model") / "colors"
    flags = ["--epochs", "200", "--images_per_step", "20", "--learning_rate", "0.01", "--dropout", "0"]
    assert train(corpus, output, *flags) == 0
    return output


@pytest.fixture(scope="module")
def stack(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner on the dual encoder."""
    output = tmp_path_factory.mktemp("stack") / "writer"
    flags = ["--epochs", "40", "--images_per_step", "20", "--learning_rate", "0.005", "--hidden_dim", "32"]
    flags += ["--averaging", "0", "--min_word_count", "1", "--num_beams", "4", "--num_judged", "3"]
    assert train(corpus, output, *flags, kind="captioner", model=f"dir:{model}") == 0
    return output


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def weights_of(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def shades(*colors: tuple[int, int, int]) -> np.ndarray:
    """uint8[n, 3, 8, 8], the toy model's input."""
    return np.broadcast_to(np.array(colors, np.uint8)[:, :, None, None], (len(colors), 3, 8, 8)).copy()


# --- what is written ------------------------------------------------------------------------------


def test_the_model_directory_is_whole(model: Path) -> None:
    assert {path.name for path in model.iterdir()} == FILES
    card = (model / "README.md").read_text()
    assert card.startswith(f"# Dual-encoder on {TOY}@1\n")
    assert "40 images with 40 captions from `" in card and "/train.tar`; validated on `" in card
    assert "| text→image R@10 | 1.000 |" in card and "| AUC | " in card
    assert "| learning_rate | 0.01 |" in card and "| hidden_dim | 1024 |" in card and "| dropout | 0.0 |" in card
    assert "![loss and R@10 by epoch](curves.svg)" in card
    assert ElementTree.fromstring((model / "curves.svg").read_text()).tag.endswith("svg")
    config = config_of(model)
    assert (config["kind"], config["base"], config["base_revision"]) == ("dual-encoder", TOY, "1")
    assert config["finetuned"] == [] and config["recipe"]["num_epochs"] == 200
    assert set(config["calibration"]) == {"scale", "bias"}


def test_what_is_printed(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(corpus, tmp_path / "m", *SHORT_OF["matcher"], "--licence", "Nobody owns these.", kind="matcher") == 0
    printed = capsys.readouterr().out
    assert f"model      dir:{tmp_path / 'm'}\n" in printed and "(on 12 validation images)" in printed
    assert "**Licence.** Nobody owns these.\n" in (tmp_path / "m" / "README.md").read_text()


# --- what it has learnt ---------------------------------------------------------------------------


def test_it_has_learnt_words_that_the_base_does_not_know(
    corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = {}
    for spec in (TOY, f"dir:{model}"):
        command = ["evaluate", "zero-shot", "--input", str(corpus / "val.tar"), "--model", spec]
        assert main([*command, "--template", "{} thing", "--json"]) == 0
        top[spec] = json.loads(capsys.readouterr().out)["figures"]["top-1"]["value"]
    assert top[f"dir:{model}"] == 1.0 > top[TOY]


def test_it_builds_and_searches_a_catalog(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = str(tmp_path / "catalog")
    assert main(["build", "--input", str(corpus / "val.tar"), "--catalog", catalog, "--model", f"dir:{model}"]) == 0
    capsys.readouterr()
    assert main(["search", catalog, "navy thing", "--json", "-k", "3"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [int(row["key"]) % 4 for row in results] == [2, 2, 2]
    assert main(["search", catalog, "x", "--model", TOY]) == 2


def test_it_says_which_captions_match(corpus: Path, model: Path, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog"
    command = ["build", "--input", str(corpus / "val.tar"), "--catalog", str(catalog), "--model", f"dir:{model}"]
    assert main([*command, "--ops", "quality,caption_match"]) == 0
    found = DeltaTable(str(catalog / "images")).to_pyarrow_table().column("source_caption_match").to_pylist()
    assert all(0.5 < match <= 1 for (match,) in found)


def test_the_loaded_model_equals_the_trained_one(model: Path) -> None:
    directory = ModelDirectory(model)
    trained = DualEncoder(HeadsConfig(**directory.config["shapes"])).eval()
    for part in ("image", "text", "crowding"):
        directory.fill(getattr(trained, part), part)
    pixels = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8), dtype=np.uint8)
    texts = ["lime thing", "else"]
    base = load_image_model(TOY, CPU).encode_images(pixels)
    inputs = {"features": torch.from_numpy(base.features), "embedding": torch.from_numpy(base.embeddings)}
    vectors = torch.from_numpy(load_text_model(TOY).encode_texts(texts))
    with torch.no_grad():
        expected, expected_texts = trained.encode_images(inputs), trained.encode_texts({"vectors": vectors})
    spec = f"dir:{model}"
    found = load_image_model(spec, CPU)
    encoding = found.encode_images(pixels)
    np.testing.assert_allclose(encoding.embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(encoding.features, base.features, atol=1e-4)
    np.testing.assert_allclose(encoding.probabilities, base.probabilities, atol=1e-5)
    np.testing.assert_allclose(load_text_model(spec).encode_texts(texts), expected_texts, atol=1e-5)
    assert found.encode_images(pixels[:0]).embeddings.shape == (0, expected.shape[1])
    scores = (encoding.embeddings[[0, 3]] * expected_texts.numpy()).sum(1)
    calibration = directory.config["calibration"]
    expected_match = 1 / (1 + np.exp(-(calibration["scale"] * scores + calibration["bias"])))
    np.testing.assert_allclose(found.match(encoding, [0, 3], texts), expected_match, atol=1e-4)  # type: ignore[attr-defined]
    assert found.match(encoding, [], []).shape == (0,)  # type: ignore[attr-defined]
    tokens = load_tokenizer(spec)(texts)
    assert tokens["ids"].shape == (2, 3)
    with torch.no_grad():
        made = load_image_backbone(spec)(torch.from_numpy(pixels))
    np.testing.assert_allclose(made["embedding"], expected, atol=1e-5)


# --- a training that is run again -----------------------------------------------------------------


class Killer:
    """Interrupts a training after an epoch, once its checkpoint is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self._save = monkeypatch, loop._save
        self.numbers: list[int] = []  # of the epochs that were trained

    def after(self, number: int | None) -> None:
        def save(path: Path, parts: Any, epochs: Any, identity: Any) -> None:
            self._save(path, parts, epochs, identity)
            self.numbers.append(epochs[-1].number)
            if epochs[-1].number == number:
                raise KeyboardInterrupt

        self._monkeypatch.setattr(loop, "_save", save)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    return Killer(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_to_the_same_result(
    kind: str, corpus: Path, tmp_path: Path, killer: Killer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("whole", "0"), ("again", "0"), ("other", "1")):
        assert train(corpus, tmp_path / name, *SHORT_OF[kind], "--seed", seed, kind=kind) == 0
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "again") != weights_of(tmp_path / "other")

    killer.after(2)
    assert train(corpus, tmp_path / "killed", *SHORT_OF[kind], kind=kind) == 130
    assert "interrupted; run the same command again, and it goes on where it stopped" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint.pt"]
    killer.after(None)
    assert train(corpus, tmp_path / "killed", *SHORT_OF[kind], kind=kind) == 0

    assert killer.numbers == [1, 2, 3, 4]
    assert {path.name for path in (tmp_path / "killed").iterdir()} == FILES
    for name in FILES - {"README.md"}:  # which says when
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_checkpoint_of_another_training_is_refused(
    corpus: Path, tmp_path: Path, killer: Killer, capsys: pytest.CaptureFixture[str]
) -> None:
    killer.after(1)
    assert train(corpus, tmp_path / "m", *SHORT_OF["dual-encoder"]) == 130
    for flags in (
        ["--hidden_dim", "24"],
        ["--dropout", "0.2"],
        ["--learning_rate", "0.1"],
        ["--mixing", "1"],
        ["--finetune", "text"],
        ["--seed", "1"],
        ["--caption_field", "label"],
        ["--validation", str(corpus / "train.tar")],
    ):
        capsys.readouterr()
        assert train(corpus, tmp_path / "m", *SHORT_OF["dual-encoder"], *flags) == 2
        message = "checkpoint.pt is the checkpoint of another training (other data or flags); remove it to start anew"
        assert message in capsys.readouterr().err


# --- captions of one's own, flags in a file -------------------------------------------------------


def test_captions_are_made_of_metadata(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "captions.jinja"
    template.write_text("{% if label != 'lemon' %}{{ label }} thing\n\n  a {{ label }}\tone{% endif %}")
    flags = [*SHORT_OF["captioner"], "--validation", str(corpus / "bare.tar"), "--caption_template", str(template)]
    assert train(corpus, tmp_path / "m", "--input", str(corpus / "bare.tar"), *flags, kind="captioner") == 0
    card = (tmp_path / "m" / "README.md").read_text()
    # 40 bring their captions; of the 12 without, 9 are no lemons.
    assert f"49 images with 58 captions from `{corpus.name}/train.tar`, `{corpus.name}/bare.tar`" in card
    words = config_of(tmp_path / "m")["writer"]["words"]
    assert words == sorted(["a", "crimson", "lemon", "lime", "navy", "one", "thing"])


def test_a_template_with_an_error(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "captions.jinja"
    template.write_text("{{ label }}\n{% if %}")
    assert train(corpus, tmp_path / "m", "--caption_template", str(template)) == 2
    assert f"error: {template}, line 2: Expected an expression" in capsys.readouterr().err
    assert train(corpus, tmp_path / "m", "--caption_template", str(tmp_path / "none.jinja")) == 2
    assert "none.jinja" in capsys.readouterr().err


def test_flags_stand_in_a_file(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.flags"
    file.write_text(
        "# A short training.\n--epochs 1   # one\n--images_per_step 16 --hidden_dim 16\n--licence 'Free to use'\n"
    )
    assert train(corpus, tmp_path / "m", f"@{file}") == 0
    config = config_of(tmp_path / "m")
    assert config["recipe"]["num_epochs"] == 1 and config["shapes"]["hidden_dim"] == 16
    assert "**Licence.** Free to use\n" in (tmp_path / "m" / "README.md").read_text()


# --- models below that are trained as well --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_of_another_package_is_finetuned(kind: str, corpus: Path, tmp_path: Path) -> None:
    sides = "image" if kind == "captioner" else "image,text"
    assert train(corpus, tmp_path / "m", *SHORT_OF[kind], "--finetune", sides, kind=kind) == 0
    assert config_of(tmp_path / "m")["finetuned"] == sides.split(",")
    info = describe_model(f"dir:{tmp_path / 'm'}")
    # The toy model has captions and matches of its own, which its backbone has not.
    own = {"dual-encoder": {"embedding", "match"}, "captioner": {"caption"}, "matcher": {"match"}}[kind]
    assert info.produces == {"features", "grid", "labels", "embedding"} | own
    model = load_image_model(info.spec, CPU)
    encoding = model.encode_images(shades(*WORDS.values()))
    assert encoding.features.shape == (4, 3) and encoding.grid.shape == (4, 4, 3)
    assert encoding.probabilities.shape == (4, 3)
    if kind == "captioner":
        assert len(encoding.captions) == 4
    else:
        assert model.match(encoding, [0, 1], ["crimson thing", "lime thing"]).shape == (2,)  # type: ignore[attr-defined]
    vectors = [load_text_model(spec).encode_texts(["lime thing"]) for spec in (info.spec, TOY)]
    assert np.array_equal(*vectors) == (kind != "dual-encoder")  # whose texts are its own


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("dual-encoder", [], 0),
        ("dual-encoder", ["--pseudo_weight", "0.5"], 1),
        ("dual-encoder", ["--finetune", "image"], 1),
        ("captioner", [], 1),  # which says how wide its grid is
        ("captioner", ["--pseudo_weight", "0.5"], 2),
        ("captioner", ["--finetune", "image"], 1),
        ("matcher", ["--finetune", "image"], 1),
    ],
)
def test_the_model_below_is_not_loaded_again_and_again(
    kind: str, flags: list[str], expected: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import train as command

    loaded = []
    monkeypatch.setattr(command, "load_image_backbone", lambda spec: loaded.append(spec) or load_image_backbone(spec))
    command._grid_dim.cache_clear()
    assert train(corpus, tmp_path / "m", *SHORT_OF[kind], *flags, "--epochs", "1", kind=kind) == 0
    assert loaded == [TOY] * expected


# --- captioners -----------------------------------------------------------------------------------


def test_a_captioner_goes_on_with_cider(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--images_per_step", "20", "--hidden_dim", "32", "--min_word_count", "1", "--averaging", "0"]
    first, second = tmp_path / "first", tmp_path / "second"
    likelihood = [*flags, "--epochs", "30", "--learning_rate", "0.005"]
    assert train(corpus, first, *likelihood, kind="captioner") == 0
    capsys.readouterr()
    reward = [*flags, "--epochs", "2", "--learning_rate", "0.0001", "--objective", "cider"]
    assert train(corpus, second, *reward, "--start", str(first), kind="captioner") == 0
    printed = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert printed["ROUGE-L"] > 0.9  # it has not begun anew
    assert config_of(second)["recipe"]["objective"] == "cider" and weights_of(first) != weights_of(second)
    assert (
        train(corpus, tmp_path / "third", *reward, "--start", str(first), "--hidden_dim", "64", kind="captioner") == 2
    )
    assert "holds a captioner of other shapes or words; train with the flags" in capsys.readouterr().err
    mixed = tmp_path / "mixed"
    assert train(corpus, mixed, *reward, "--start", str(first), "--start_share", "0.25", kind="captioner") == 0
    begun, trained, between = (load_file(path / "model.safetensors") for path in (first, second, mixed))
    for name, values in between.items():
        if name.startswith("writer.") and values.is_floating_point():
            torch.testing.assert_close(values, torch.lerp(trained[name], begun[name], 0.25), atol=2e-3, rtol=2e-3)


def test_a_captioner_on_a_dual_encoder_chooses(model: Path, stack: Path) -> None:
    """Among what its search has found and the classes of the base, by the dual encoder's judgement."""
    spec = f"dir:{stack}"
    images = load_image_model(spec, CPU, frozenset({"caption"}))
    pixels = np.random.default_rng(0).integers(0, 255, (24, 3, 8, 8), dtype=np.uint8)
    pixels[:12] = shades(*(tuple(each) for each in np.random.default_rng(1).integers(0, 255, (12, 3))))
    started = time.perf_counter()
    encoding = images.encode_images(pixels)
    assert 0 < encoding.caption_sec < time.perf_counter() - started
    captions = encoding.captions

    directory = ModelDirectory(stack)
    writer = directory.fill(writer_from(directory.config["writer"], stack), "writer")
    base = load_image_model(f"dir:{model}", CPU, frozenset({"features", "grid", "labels", "embedding", "match"}))
    texts = load_text_model(f"dir:{model}")
    seen = base.encode_images(pixels)
    inputs = {"features": seen.features, "grid": seen.grid, "embedding": seen.embeddings}
    beams = writer.write({name: torch.from_numpy(values) for name, values in inputs.items()}, 4)
    classes = [class_sentence(name) for name in base.label_names]
    usual = config_of(stack)["usual_log_prob"]
    for row, caption in enumerate(captions):
        written = [each.text for each in beams[row][:3]]
        cosines = texts.encode_texts([*written, *classes]) @ seen.embeddings[row]
        best, named = cosines[:3].argmax(), 3 + cosines[3:].argmax()
        # The surer the writer is of its sentence, the better the class has to fit.
        labelled = cosines[named] > cosines[best] + 0.2 * (beams[row][best].log_prob - usual)
        assert caption.text == [*written, *classes][named if labelled else best]
        assert caption.source == ("labels" if labelled else "generated")
        expected = base.match(seen, [row], [caption.text])[0]  # type: ignore[attr-defined]
        assert caption.score == pytest.approx(expected, abs=1e-5) and 0 <= caption.score <= 1
    assert {caption.source for caption in captions} == {"generated", "labels"}
    assert len({caption.text for caption in captions}) > 2


def test_classes_are_named_only_where_they_fit_better_by_a_margin(stack: Path, tmp_path: Path) -> None:
    """Of pictures that are named by their class in the test above."""
    shutil.copytree(stack, tmp_path / "shy")
    (tmp_path / "shy" / "config.json").write_text(json.dumps(config_of(stack) | {"label_margin": 2.0}))
    pixels = shades(*(tuple(each) for each in np.random.default_rng(1).integers(0, 255, (12, 3))))
    model = load_image_model(f"dir:{tmp_path / 'shy'}", CPU, frozenset({"caption"}))
    assert {caption.source for caption in model.encode_images(pixels).captions} == {"generated"}


def test_a_captioner_on_a_dual_encoder_is_described_and_built(
    corpus: Path, model: Path, stack: Path, tmp_path: Path
) -> None:
    info = describe_model(f"dir:{stack}")
    assert info.spec == f"dir:{stack}" and info.encodes_text
    assert info.produces == {"features", "grid", "labels", "embedding", "match", "caption"}
    assert config_of(stack)["base"] == f"dir:{model}"
    assert config_of(stack)["base_revision"] == describe_model(f"dir:{model}").revision != info.revision
    catalog = tmp_path / "catalog"
    command = ["build", "--input", str(corpus / "val.tar"), "--catalog", str(catalog), "--model", f"dir:{stack}"]
    assert main([*command, "--ops", "quality,labels,caption,embedding,caption_match"]) == 0
    rows = DeltaTable(str(catalog / "images")).to_pyarrow_table().to_pylist()
    assert "crimson thing" in {row["caption"] for row in rows}
    assert all(row["caption_match"] == pytest.approx(row["caption_score"], abs=1e-5) for row in rows)
    # The writer knows the images' own captions; what was chosen fits as well as they do, or better.
    assert all(row["source_caption_match"][0] <= row["caption_match"] + 1e-5 for row in rows)
    # Queries are encoded by the dual encoder below.
    vectors = [load_text_model(f"dir:{path}").encode_texts(["lime thing"]) for path in (stack, model)]
    assert np.array_equal(*vectors)


# --- words for what cannot be done ----------------------------------------------------------------


@pytest.mark.parametrize("below", ["model", "stack"])
def test_a_model_does_not_replace_what_it_stands_on(
    below: str, corpus: Path, model: Path, request: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = config_of(model)
    base = f"dir:{request.getfixturevalue(below)}"
    assert train(corpus, model, *SHORT_OF["captioner"], kind="captioner", model=base) == 2
    assert f"is the directory of dir:{model}, which the model stands on; name another" in capsys.readouterr().err
    assert config_of(model) == kept


def test_wrong_files_are_told_of_before_images_are_read(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ["--input", str(tmp_path / "no-images")]
    for flags, message in (
        (["--caption_template", "no.jinja"], "there is no caption template 'no.jinja'; name a file that exists"),
        (["--start", str(tmp_path)], "there is no config.json"),
        (["--start", f"dir:{model}"], "holds no captioner; name a directory that `train captioner` has written"),
    ):
        assert train(corpus, tmp_path / "m", *nowhere, *flags, kind="captioner") == 2
        assert message in capsys.readouterr().err


def test_broken_weights_and_checkpoints_say_so(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(weights_of(model)[:100])
    with pytest.raises(ValueError, match=r"cannot be read: model.safetensors: .*; copy it anew, or train it again"):
        ModelDirectory(broken).weights("image")
    (broken / "model.safetensors").write_bytes(weights_of(model))
    with pytest.raises(ValueError, match="its weights are not of the shapes that config.json tells of"):
        ModelDirectory(broken).fill(torch.nn.Linear(2, 2), "image")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "checkpoint.pt").write_bytes(b"PK cut")
    assert train(corpus, tmp_path / "m", *SHORT_OF["dual-encoder"]) == 2
    assert "checkpoint.pt cannot be read; remove it to start anew" in capsys.readouterr().err


def test_what_is_no_model_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no model in '.*nothing': there is no config.json; `beamsight train` writes one"
    ):
        describe_model(f"dir:{tmp_path}/nothing")
    for name, change, message in (
        ("kind", {"kind": "poet"}, "is a 'poet', which this version cannot load"),
        ("base", {"base_revision": "0"}, "was trained on python:tests.toys@0, but python:tests.toys@1 is installed"),
        ("half", {}, "is not whole: there is no model.safetensors"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_of(model) | change))
        if name != "half":
            (folder / "model.safetensors").write_bytes(weights_of(model))
        with pytest.raises(ValueError, match=message):
            describe_model(f"dir:{folder}")
    (tmp_path / "half" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"the model in '.*half' cannot be read: config.json: "):
        describe_model(f"dir:{tmp_path / 'half'}")


def test_a_model_that_is_trained_anew_is_another_one(corpus: Path, tmp_path: Path) -> None:
    """In the same process too, where revisions are remembered."""
    assert train(corpus, tmp_path / "m", *SHORT_OF["dual-encoder"]) == 0
    first = describe_model(f"dir:{tmp_path / 'm'}")
    assert train(corpus, tmp_path / "m", *SHORT_OF["dual-encoder"], "--seed", "1") == 0
    assert describe_model(f"dir:{tmp_path / 'm'}").revision != first.revision


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("poet", [], "argument kind: invalid choice: 'poet'"),
        (
            "matcher",
            ["--language_model", "hf:gpt2"],
            "--language_model is for captioner, and a matcher does not read it; leave it out",
        ),
        (
            "dual-encoder",
            ["--writer", "cross-attention"],
            "--writer is for captioner, and a dual-encoder does not read it",
        ),
        ("matcher", ["--mixing", "1"], "--mixing is for dual-encoder, and a matcher does not read it"),
        ("captioner", ["--text_model", "compact"], "--text_model is for dual-encoder and matcher, and a captioner"),
        (
            "captioner",
            ["--writer", "cross-attention"],
            "--writer cross-attention needs --language_model, such as hf:gpt2",
        ),
        ("captioner", ["--writer", "vision-encoder-decoder"], "vision-encoder-decoder needs --language_model"),
        ("captioner", ["--writer", "compact", "--language_model", "hf:gpt2"], "is not read by --writer compact"),
        ("captioner", ["--finetune", "image,text"], "--finetune text: a captioner has no text side"),
        ("matcher", ["--finetune", "sound"], "must be image, text or image,text, got 'sound'"),
        ("matcher", ["--learning_rate", "0"], "argument --learning_rate: must be above 0, got 0"),
        ("matcher", ["@/no/such.flags"], "/no/such.flags"),
        ("matcher", ["--seed", "-1"], "argument --seed: must not be negative, got -1"),
        ("dual-encoder", ["--mixing", "-5"], "argument --mixing: must not be negative, got -5"),
        ("captioner", ["--label_margin", "nan"], "argument --label_margin: must be finite, got nan"),
        ("captioner", ["--objective", "cider"], "for a captioner that can write already; name it with --start DIR"),
        ("captioner", ["--start_share", "0.5"], "of the weights to begin with; name them with --start DIR"),
        (
            "captioner",
            ["--objective", "cider", "--start", "m", "--language_model", "hf:gpt2"],
            "--objective cider is for the compact writer; train cross-attention with --objective likelihood",
        ),
    ],
)
def test_wrong_flags(kind: str, flags: list[str], message: str, corpus: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        train(corpus, tmp_path / "m", *flags, kind=kind)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_image_encoder(tmp_path_factory.mktemp("vit"))


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("matcher", ["--model", "VIT"], "model 'VIT' has no text side; name a model that has one with --text_model"),
        ("matcher", ["--text_model", "hf:/nothing"], "no model 'hf:/nothing'"),
        ("captioner", ["--hidden_dim", "30"], "--hidden_dim of the compact writer must be a multiple of 4, got 30"),
        ("captioner", ["--min_word_count", "99"], "no word stands 99 times in the captions; lower --min_word_count"),
        (
            "captioner",
            ["--model", "VIT", "--language_model", "GPT2", "--writer", "vision-encoder-decoder", "--finetune", "image"],
            "--writer vision-encoder-decoder is always trained as one; leave out --finetune",
        ),
        (
            "dual-encoder",
            ["--model", "VIT", "--text_model", TOY, "--pseudo_weight", "0.5"],
            "--pseudo_weight 0.5 needs a frozen model with a classifier, which 'VIT' is not; leave the flag out",
        ),
        ("captioner", ["--finetune", "image", "--pseudo_weight", "1"], f"a classifier, which '{TOY}' is not"),
        ("captioner", ["--model", "VIT", "--pseudo_weight", "1"], "a classifier, which 'VIT' is not"),
        ("captioner", ["--start", "/nothing"], "no model in '/nothing'"),
        ("dual-encoder", ["--caption_field", "nothing"], "has a caption; name their field with --caption_field"),
        ("dual-encoder", ["--learning_rate", "1e30"], "are no numbers; take a smaller --learning_rate than 1e+30"),
    ],
)
def test_what_cannot_be_trained_says_so(
    kind: str, flags: list[str], message: str, corpus: Path, vit: str, tmp_path: Path, capsys: Any
) -> None:
    specs = {"VIT": vit, "GPT2": save_language_model(tmp_path / "gpt2") if "GPT2" in flags else ""}
    assert train(corpus, tmp_path / "m", *[specs.get(flag, flag) for flag in flags], kind=kind) == 2
    assert message.replace("VIT", vit) in capsys.readouterr().err


def test_pseudo_images_are_trained_on(corpus: Path, tmp_path: Path) -> None:
    for kind in ("dual-encoder", "captioner"):
        assert train(corpus, tmp_path / kind, *SHORT_OF[kind], "--pseudo_weight", "0.5", kind=kind) == 0
        assert config_of(tmp_path / kind)["recipe"]["pseudo_weight"] == 0.5
    # What the classes are called is in the vocabulary, though no caption says it.
    assert {"photo", "red", "green", "blue"} <= set(config_of(tmp_path / "captioner")["writer"]["words"])


def test_the_output_is_a_local_directory(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(corpus, "s3://bucket/model") == 2
    assert "--output must be a local directory, got 's3://bucket/model'" in capsys.readouterr().err


def test_validation_needs_different_captions(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = tmp_path / "alike.tar"
    members = [(f"{n}.{end}", data) for n in range(2) for end, data in (
        ("png", encode(Image.new("RGB", (16, 16), (n, 9, 9)), "PNG")), ("txt", b"the same")
    )]  # fmt: skip
    tar.write_bytes(tar_bytes(members))
    command = ["train", "matcher", "--input", str(corpus / "train.tar"), "--validation", str(tar), "--model", TOY]
    assert main([*command, "--output", str(tmp_path / "m"), "--device", "cpu"]) == 2
    assert (
        "all images have the same captions, so that nothing could tell them apart; add other ones"
        in capsys.readouterr().err
    )
