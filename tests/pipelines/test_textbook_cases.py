"""What every trainer should be able to do, with the models that everybody knows: learn eight photos by heart.

The models are those of the textbooks in their layout (ResNet-50, ViT, BERT, GPT-2), tiny in their widths, and begin
with random weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from deltalake import DeltaTable

from pipelines.cli import main
from tests.conftest import photo, png, tar_bytes
from tests.vlm_ops.test_backbone_families import IMAGE_MODELS, settled
from tests.vlm_ops.test_language_model import CAPTIONS, save_image_encoder, save_language_model
from vlm_ops.images import preprocess
from vlm_ops.models import load_image_model
from vlm_ops.models.settings import CPU

pytestmark = pytest.mark.usefixtures("own_cache")

TOY = "python:tests.toys"
KEYS = tuple(f"photo{seed}" for seed in range(len(CAPTIONS)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of eight photos with a caption each."""
    members = []
    for seed, (key, caption) in enumerate(zip(KEYS, CAPTIONS, strict=True)):
        members += [(f"{key}.png", png(seed)), (f"{key}.json", json.dumps({"caption": caption}).encode())]
    path = tmp_path_factory.mktemp("photos") / "eight.tar"
    path.write_bytes(tar_bytes(members))
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("resnet")
    make, processor = IMAGE_MODELS["resnet"]
    settled(make(), 64).save_pretrained(path)
    processor.save_pretrained(path)
    return f"hf:{path}"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_image_encoder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_language_model(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in CAPTIONS for word in text.split()})]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(path)
    return f"hf:{path}"


def train(kind: str, photos: Path, output: Path, *flags: str) -> str:
    """Eight photos, which are all that there is: trained on, and measured on."""
    recipe = ["--images_per_step", "8", "--captions_per_image", "1", "--averaging", "0", "--dropout", "0",
              "--weight_decay", "0", "--dtype", "float32", "--device", "cpu", "--num_threads", "1"]  # fmt: skip
    data = ["--input", str(photos), "--validation", str(photos), "--output", str(output)]
    assert main(["train", kind, *data, *recipe, *flags]) == 0
    return f"dir:{output}"


def captions_of(photos: Path, model: str, catalog: Path) -> list[str]:
    """What `build` writes below the photos."""
    command = ["build", "--input", str(photos), "--catalog", str(catalog), "--ops", "quality,caption"]
    assert main([*command, "--model", model, "--device", "cpu", "--num_threads", "1"]) == 0
    rows = DeltaTable(str(catalog / "images")).to_pyarrow_table(columns=["key", "caption"]).to_pylist()
    found = {row["key"]: row["caption"] for row in rows}
    return [found[key] for key in KEYS]


def pixels_of(model) -> np.ndarray:
    tensors = [torch.from_numpy(np.array(photo(seed))).permute(2, 0, 1) for seed in range(len(CAPTIONS))]
    return np.stack([preprocess(each, model.preprocessing).numpy() for each in tensors])


def figures(printed: str) -> dict[str, float]:
    return {name.strip(): float(value) for name, value in re.findall(r"^(.+?) +([\d.]+)   \(on", printed, re.M)}


@pytest.mark.parametrize("finetuned", ["nothing", "image,text"])
def test_a_matcher_on_resnet_and_bert(
    finetuned: str, photos: Path, resnet: str, bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", resnet, "--text_model", bert, "--hidden_dim", "64", "--learning_rate", "0.005"]
    if finetuned != "nothing":
        flags += ["--finetune", finetuned]
    spec = train("matcher", photos, tmp_path / "matcher", *flags, "--epochs", "120")
    assert figures(capsys.readouterr().out) == {"AUC": 1.0, "accuracy": 1.0}
    model = load_image_model(spec, CPU, frozenset({"match"}))
    encoding = model.encode_images(pixels_of(model))
    rows, texts = zip(*[(row, text) for row in range(8) for text in CAPTIONS], strict=True)
    matches = model.match(encoding, rows, texts).reshape(8, 8) > 0.5
    assert matches.tolist() == np.eye(8, dtype=bool).tolist()


def test_a_captioner_of_resnet_and_gpt2(photos: Path, resnet: str, gpt2: str, tmp_path: Path) -> None:
    flags = ["--model", resnet, "--language_model", gpt2, "--num_beams", "1"]
    spec = train("captioner", photos, tmp_path / "model", *flags, "--learning_rate", "0.005", "--epochs", "100")
    assert captions_of(photos, spec, tmp_path / "catalog") == list(CAPTIONS)


def test_a_captioner_of_vit_and_gpt2_trained_as_one(photos: Path, vit: str, gpt2: str, tmp_path: Path) -> None:
    flags = ["--model", vit, "--language_model", gpt2, "--writer", "vision-encoder-decoder", "--num_beams", "1"]
    spec = train("captioner", photos, tmp_path / "model", *flags, "--learning_rate", "0.005", "--epochs", "100")
    assert captions_of(photos, spec, tmp_path / "catalog") == list(CAPTIONS)


def test_a_compact_captioner(photos: Path, tmp_path: Path) -> None:
    flags = ["--model", TOY, "--min_word_count", "1", "--hidden_dim", "64", "--num_beams", "1"]
    spec = train("captioner", photos, tmp_path / "model", *flags, "--learning_rate", "0.005", "--epochs", "100")
    assert captions_of(photos, spec, tmp_path / "catalog") == list(CAPTIONS)


def test_a_dual_encoder_of_resnet_and_bert(
    photos: Path, resnet: str, bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", resnet, "--text_model", bert, "--finetune", "image,text", "--hidden_dim", "64"]
    spec = train("dual-encoder", photos, tmp_path / "model", *flags, "--learning_rate", "0.005", "--epochs", "40")
    assert figures(capsys.readouterr().out)["text→image R@1"] == 1.0
    catalog = str(tmp_path / "catalog")
    command = ["build", "--input", str(photos), "--catalog", catalog, "--model", spec, "--device", "cpu"]
    assert main([*command, "--num_threads", "1"]) == 0
    capsys.readouterr()
    assert main(["search", catalog, *CAPTIONS, "--json", "-k", "1", "--device", "cpu"]) == 0
    answers = [json.loads(line)["results"][0]["key"] for line in capsys.readouterr().out.splitlines()]
    assert answers == list(KEYS)
