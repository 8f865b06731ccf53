"""`beamsight build` with models of several families, and what it says of those that cannot serve."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from deltalake import DeltaTable

from pipelines.cli import main
from tests.conftest import jpeg
from tests.vlm_ops.tiny_models import make_model
from vlm_ops.images import decode, preprocess
from vlm_ops.models import load_image_model
from vlm_ops.models.settings import ModelSettings

pytestmark = pytest.mark.usefixtures("own_cache")

_TORCH = ModelSettings("cpu", "float32", "torch")  # nothing has to be exported


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(6):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))
    return folder


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(name, folder / name) for name in ("clip", "vit", "git", "smolvlm", "bert", "torchvision")}


def rows(catalog: Path) -> list[dict[str, Any]]:
    return DeltaTable(str(catalog / "images")).to_pyarrow_table().sort_by("uri").to_pylist()


def build(photos: Path, catalog: Path, *flags: str) -> int:
    return main(["build", "--input", str(photos), "--catalog", str(catalog), *flags])


def test_each_op_has_a_model_of_its_own(
    photos: Path, specs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    catalog = tmp_path / "catalog"
    flags = ["--embedding_model", specs["clip"], "--feature_model", specs["vit"], "--caption_model", specs["git"],
             "--label_model", specs["torchvision"], "--max_new_tokens", "5", "--engine", "torch"]  # fmt: skip
    assert build(photos, catalog, *flags) == 0
    found = rows(catalog)
    data = [(photos / f"{seed}.jpg").read_bytes() for seed in range(6)]

    def encode(name: str) -> Any:
        model = load_image_model(specs[name], _TORCH)
        form = model.preprocessing
        return model.encode_images(np.stack([preprocess(decode(each).pixels, form).numpy() for each in data]))

    np.testing.assert_allclose([row["image_embedding"] for row in found], encode("clip").embeddings, atol=1e-4)
    np.testing.assert_allclose([row["features"] for row in found], encode("vit").features, atol=1e-4)
    likeliest = encode("torchvision").probabilities.argmax(axis=1)
    names = load_image_model(specs["torchvision"], _TORCH, frozenset()).label_names
    assert [row["labels"][0]["name"] for row in found] == [names[label] for label in likeliest]
    processor, net = (
        kind.from_pretrained(specs["git"][3:]) for kind in (transformers.AutoProcessor, transformers.GitForCausalLM)
    )
    ids = net.eval().generate(
        **processor(images=[str(photos / "0.jpg")], return_tensors="pt"), max_new_tokens=5, do_sample=False
    )
    assert found[0]["caption"] == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    capsys.readouterr()
    assert main(["search", str(catalog), "--image", str(photos / "3.jpg"), "--json", "-k", "1"]) == 0
    (best,) = json.loads(capsys.readouterr().out)["results"]
    assert best["uri"].endswith("3.jpg") and best["score"] == pytest.approx(1, abs=1e-4)
    assert main(["search", str(catalog), "a black dog", "-k", "1"]) == 0
    assert build(photos, catalog, *flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    for other in (["--max_new_tokens", "6"], ["--dtype", "bfloat16"], ["--num_beams", "2"]):
        assert build(photos, catalog, *flags, *other, "--dry_run") == 0
        told = capsys.readouterr().out
        assert "(6 images by another recipe)" in told and f"{other[0][2:]}={other[1]}" in told, told


def test_a_prompt_is_followed_and_kept(photos: Path, specs: dict[str, str], tmp_path: Path) -> None:
    catalogs = [tmp_path / "one", tmp_path / "two"]
    flags = ["--ops", "caption", "--caption_model", specs["smolvlm"], "--max_new_tokens", "6"]
    assert build(photos, catalogs[0], *flags) == 0
    assert build(photos, catalogs[1], *flags, "--caption_prompt", "the dog") == 0
    one, two = ([row["caption"] for row in rows(each)] for each in catalogs)
    assert one != two and all(map(str.strip, filter(None, one)))
    ids = {row["recipe_id"] for each in catalogs for row in rows(each)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--embedding_model clp", "unknown model 'clp'; known models: compact, "),
        ("--embedding_model {vit}", "cannot serve op 'embedding'; it serves: features, grid"),
        ("--embedding_model {git}", "cannot serve op 'embedding'; it serves: caption"),
        ("--feature_model {bert}", "cannot serve op 'features'; it serves: texts alone"),
        ("--caption_model {clip}", "cannot serve op 'caption'; it serves: embedding, features, grid"),
        ("--ops quality --caption_model {git}", "was named for op 'caption', which is not computed; add it to --ops"),
        ("--ops quality --num_beams 2", "--num_beams is for captions, which are not computed; add caption to --ops"),
        ("--ops caption --caption_prompt x", "model 'compact' does not follow --caption_prompt x; it takes --num_beams"),
        ("--device cuda", "--device cuda was asked for, but no CUDA device is available here"),
        ("--device cuda:1", "--device cuda:1 was asked for, but no CUDA device is available here"),
        ("--model {bert}", "encodes texts alone and serves no op; name a model of images"),
        ("--model dir:{clip_path}", "is one of transformers; name it hf:"),
        ("--device tpu", "unknown device 'tpu'; use auto, cpu, cuda or cuda:N"),
        ("--dtype float16", "--dtype float16 is for GPUs"),
        ("--dtype int8 --engine torch", "--dtype int8 is computed by ONNX Runtime"),
        ("--engine onnxruntime --dtype bfloat16", "--engine onnxruntime computes in float32 or int8, not in bfloat16"),
        ("--compile --engine onnxruntime", "--compile is for torch"),
        ("--model hf:nobody/nothing", "`beamsight fetch-model hf:nobody/nothing --to DIR`, and name hf:DIR"),
    ],
)  # fmt: skip
def test_mistakes_end_before_any_work(
    flags: str, message: str, photos: Path, specs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    try:
        code = build(photos, tmp_path / "catalog", *flags.format(**specs, clip_path=specs["clip"][3:]).split())
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "catalog" / "images").exists()


def test_a_model_that_cannot_be_loaded_is_a_mistake(
    photos: Path, specs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, message in (
        ("vit", "the weights in"),
        ("torchvision", "cannot read the weights in"),
        ("git", "copy or fetch the whole model anew"),
    ):
        family, _, path = specs[name].rpartition(":")
        source, broken = Path(path), tmp_path / name
        shutil.copytree(source if source.is_dir() else source.parent, broken)
        weights = next(each for each in broken.iterdir() if each.suffix in (".safetensors", ".pth"))
        weights.write_bytes(weights.read_bytes()[:-40])
        ops = "caption" if name == "git" else "features"
        spec = f"{family}:{broken if source.is_dir() else weights}"
        assert build(photos, tmp_path / "c", "--ops", ops, "--model", spec) == 2, name
        error = capsys.readouterr().err
        assert message in error and str(tmp_path) in error and "Traceback" not in error


def test_what_would_be_wrong_in_silence_is_refused(
    photos: Path, specs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, ops in (("clip", "embedding"), ("git", "caption")):
        for file in Path(shutil.copytree(specs[name][3:], tmp_path / name)).glob("tokenizer*"):
            file.unlink()
        assert build(photos, tmp_path / "c", "--ops", "quality", "--model", f"hf:{tmp_path / name}") == 0
        assert build(photos, tmp_path / name / "c", "--ops", ops, "--model", f"hf:{tmp_path / name}") == 2
        assert "tokenizer" in capsys.readouterr().err
    # Weights that are no numbers: each image fails by itself, and nothing is published.
    path = Path(shutil.copytree(specs["vit"][3:], tmp_path / "nan"))
    net = transformers.ViTModel.from_pretrained(path)
    net.layernorm.bias.data[:] = float("nan")
    net.save_pretrained(path)
    assert build(photos, tmp_path / "nan" / "c", "--ops", "features", "--model", f"hf:{path}") == 3
    assert "gives numbers that are not finite: its weights are broken" in capsys.readouterr().err
    # Text queries are encoded on the CPU, and yet a device that is not there is said not to be.
    catalog = tmp_path / "catalog"
    assert build(photos, catalog, "--ops", "embedding", "--model", "python:tests.toys") == 0
    for command in (["search", str(catalog), "red"], ["tag", str(catalog)]):
        assert main([*command, "--device", "cuda:7"]) == 2
        assert "--device cuda:7 was asked for" in capsys.readouterr().err


@pytest.fixture
def own_code(tmp_path: Path) -> str:
    """A dual encoder whose code lies beside its weights; it leaves a mark when it is run."""
    path = tmp_path / "own"
    make_model("clip", path)
    (path / "own.py").write_text(
        textwrap.dedent(
            f"""
            from pathlib import Path
            from transformers import CLIPConfig, CLIPModel
            Path({str(tmp_path / "mark")!r}).touch()

            class OwnConfig(CLIPConfig):
                model_type = "own"

            class OwnModel(CLIPModel):
                config_class = OwnConfig
            """
        )
    )
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (path / "config.json").write_text(json.dumps(config))
    return f"hf:{path}"


def test_code_of_a_repository_is_run_only_where_a_person_says_so(
    own_code: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    catalog, flags = tmp_path / "catalog", ["--ops", "embedding", "--model", own_code]
    assert build(photos, catalog, *flags) == 2
    assert "runs code that lies in its repository" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert build(photos, catalog, *flags, "--trust_remote_code") == 0
    assert (tmp_path / "mark").exists()
    for command in (["search", str(catalog), "a dog"], ["tag", str(catalog)], ["retry", str(catalog)]):
        assert main(command) == 2
        assert "--trust_remote_code" in capsys.readouterr().err
        assert main([*command, "--trust_remote_code"]) == 0
        capsys.readouterr()


def test_code_of_another_repository_is_never_run(
    own_code: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = Path(own_code[3:]) / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"]["AutoModel"] = "someone/else--own.OwnModel"
    file.write_text(json.dumps(config))
    assert build(photos, tmp_path / "c", "--ops", "embedding", "--model", own_code, "--trust_remote_code") == 2
    assert "runs code of another repository, 'someone/else', which is not supported" in capsys.readouterr().err
