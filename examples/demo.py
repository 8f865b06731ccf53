"""The main job on the photographs that scikit-image and scikit-learn ship: build, then three searches.

Prints each command before it runs it, so that the next one can be typed by hand.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PHOTOS = {
    "skimage/data": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg",
        "rocket.jpg", "text.png",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}  # fmt: skip
QUERIES = ("a cat", "a man with a camera", "a cup of coffee")


def main(target: Path) -> int:
    """Builds `target/catalog` and `target/gallery.html`."""
    photos = [str(folder / name) for place, names in PHOTOS.items() for folder in [_folder(place)] for name in names]
    catalog, gallery = target / "catalog", target / "gallery.html"
    _beamsight("build", "--input", *photos, "--catalog", str(catalog), "--ops", "default,tagging")
    _beamsight("tag", str(catalog))
    _beamsight("search", str(catalog), *QUERIES, "-k", "4", "--html", str(gallery))
    print(f"\ncatalog    {catalog}\ngallery    {gallery.resolve().as_uri()}")
    return 0


def _folder(place: str) -> Path:
    package = find_spec(place.partition("/")[0])
    if package is None or package.origin is None:
        sys.exit(f"the demo needs {place.partition('/')[0]}; install it with: pip install 'beamsight[demo]'")
    return Path(package.origin).parents[1] / place


def _beamsight(*arguments: str) -> None:
    shown = [Path(argument).name if argument.endswith((".png", ".jpg")) else argument for argument in arguments]
    print(f"\n$ beamsight {shlex.join(shown)}", flush=True)
    code = subprocess.call([sys.executable, "-m", "pipelines.cli", *arguments])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")))
