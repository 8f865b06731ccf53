"""Inputs that the tests share; everything is drawn or packed here, nothing is downloaded.

    photo(seed)            RGB picture with some structure, as a Pillow image
    jpeg(seed), png(seed)  the same, encoded
    tar_bytes(members)     a tar of (name, bytes) pairs, with its end-of-archive blocks
    dev_shard              the real photos of flickr8k/dev; skips where the data folder is absent
    own_cache              a cache of prepared models and encoded corpora for a module's tests alone
    toy_catalog            a catalog built once a session from drawn photos, with the real default model

Toy model and op for contract tests: tests/toys.py.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks the network

DATA = Path(os.environ.get("BEAMSIGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def photo(seed: int = 0, width: int = 96, height: int = 64) -> Image.Image:
    """A smooth random background with some shapes: compresses like a photo, differs by seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        color = tuple(int(v) for v in rng.integers(0, 255, 3))
        draw.ellipse([x, y, x + width // 4, y + height // 3], fill=color)
    return image


def encode(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, width: int = 96, height: int = 64, **options: object) -> bytes:
    return encode(photo(seed, width, height), "JPEG", quality=90, **options)


def png(seed: int = 0, width: int = 96, height: int = 64) -> bytes:
    return encode(photo(seed, width, height), "PNG")


def tar_bytes(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar (mode `w`) or a gzipped one (`w:gz`)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def dev_shard() -> Path:
    path = DATA / "flickr8k" / "dev-00000.tar"
    if not path.exists():
        pytest.skip(f"needs the Flickr8k dev shard at {path} (set BEAMSIGHT_DATA)")
    return path


@pytest.fixture(scope="session")
def user_cache() -> Path:
    """The cache of prepared models that the user has."""
    from vlm_ops.models.onnx_engine import cache_dir

    return cache_dir()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For modules that run toy models through torch."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, more only wait for one another
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("BEAMSIGHT_CACHE", str(cache))
        yield cache
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def toy_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve drawn photos, three of them with something beside, and a tar of eight more."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed in range(12):
        (folder / f"photo{seed:02}.jpg").write_bytes(jpeg(seed))
    (folder / "photo00.json").write_text('{"caption": "a drawn photo", "licence": "none"}')
    (folder / "photo01.txt").write_text("first caption\nsecond caption\n")
    members = [(f"member{seed:02}.jpg", jpeg(100 + seed)) for seed in range(8)]
    (folder / "shard.tar").write_bytes(tar_bytes(members))
    return folder


@pytest.fixture(scope="session")
def toy_catalog(tmp_path_factory: pytest.TempPathFactory, toy_inputs: Path) -> Path:
    from pipelines.cli import main

    catalog = tmp_path_factory.mktemp("catalog") / "catalog"
    assert main(["build", "--input", str(toy_inputs), "--catalog", str(catalog)]) == 0
    return catalog
