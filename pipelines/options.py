"""Flags -> frozen config objects. Nothing heavy is imported here, so that `--help` and a wrong flag
answer at once."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urljoin

from schemas.recipes import (
    DEFAULT_MAX_CATEGORIES,
    DEFAULT_MAX_IMAGE_BYTES,
    DEFAULT_MAX_IMAGE_PIXELS,
    DEFAULT_MIN_SCORE,
    DEFAULT_MODEL,
    DEFAULT_OPS,
    DEFAULT_TAXONOMY,
    OP_GROUPS,
    OpSpec,
    Recipe,
)
from schemas.samples import FILES_PER_SHARD, INPUT_FORMATS
from vlm_ops.cores import usable_cores
from vlm_ops.models.settings import DTYPES, ENGINES, ModelSettings, check, planned

if TYPE_CHECKING:
    from vlm_ops.inputs import InputConfig
    from vlm_ops.ops import ModelChoice
    from vlm_ops.shards import ReadConfig


# The flag that names the model of an op.
MODEL_FLAGS = {
    "embedding": "embedding_model", "features": "feature_model", "labels": "label_model", "caption": "caption_model",
}  # fmt: skip
_VARIABLE = re.compile(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Flags of every command that reads images and runs a model over them."""

    input: tuple[str, ...]
    input_format: str
    uri_column: str | None
    image_column: str | None
    caption_field: str | None
    allowed_schemes: tuple[str, ...]
    files_per_shard: int
    storage_options: dict[str, Any]
    model: str
    device: str
    batch_size: int | None
    num_threads: int | None
    max_image_bytes: int
    max_image_pixels: int


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ReadingOptions):
    """Flags of every command that runs whatever model, of how it is run."""

    dtype: str
    engine: str
    compile: bool
    trust_remote_code: bool
    caption_prompt: str | None
    max_new_tokens: int | None
    num_beams: int | None


@dataclass(frozen=True, kw_only=True)
class RunningOptions:
    """Flags of every command that runs a pipeline. `num_threads` None: as many as the machine at work has cores;
    `beam_args` are the flags that belong to Beam."""

    runner: str
    num_threads: int | None
    device: str = "cpu"
    beam_args: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class BuildOptions(RunningOptions, ModelOptions):
    """Flags of `beamsight build`."""

    catalog: str
    ops: tuple[str, ...] | None
    embedding_model: str | None
    feature_model: str | None
    label_model: str | None
    caption_model: str | None
    max_failure_rate: float
    prune: bool
    verify_content: bool
    no_recompute: bool
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Flags of `beamsight evaluate`. `label_field` is for `zero-shot` and `tags`, `template` for `zero-shot`, `mention`,
    `synonyms` and `never` for `captions`; `tags` reads `catalog`, `mapping` and `taxonomy` in place of `input`."""

    task: str
    catalog: str | None
    mapping: str | None
    taxonomy: str
    label_field: str
    template: tuple[str, ...]
    mention: tuple[str, ...]
    synonyms: str | None
    never: tuple[str, ...]
    json: bool
    html: str | None


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ModelOptions):
    """Flags of `beamsight score`: either `input`, or `image` and `text`."""

    image: tuple[str, ...]
    text: tuple[str, ...]
    json: bool
    output: str | None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ReadingOptions):
    """Flags of `beamsight train`. `writer`, `language_model`, `num_beams` and `min_word_count` are for captioners,
    `text_model` and `hidden_dim` for what joins two sides."""

    kind: str
    validation: tuple[str, ...]
    caption_template: str | None
    text_model: str
    finetune: frozenset[str]
    writer: str
    language_model: str | None
    objective: str
    start: str | None
    start_share: float
    num_beams: int
    num_judged: int
    label_margin: float
    min_word_count: int
    output: str
    epochs: int
    images_per_step: int
    captions_per_image: int
    learning_rate: float
    weight_decay: float
    averaging: float
    dropout: float
    hidden_dim: int
    mixing: float
    mirrored: bool
    pseudo_weight: float
    dtype: str
    licence: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class CatalogOptions:
    """Flags of every command on a catalog that is there."""

    catalog: str
    storage_options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class IndexOptions(RunningOptions, CatalogOptions):
    """Flags of `beamsight index`, and of every command that runs a pipeline on a catalog."""


@dataclass(frozen=True, kw_only=True)
class TagOptions(IndexOptions):
    """Flags of `beamsight tag`. `calibrate`, `mapping` and `label_field` are for fitting `calibration`."""

    taxonomy: str
    max_categories: int
    min_score: float
    text_model: str | None
    device: str
    trust_remote_code: bool
    all: bool
    dry_run: bool
    calibration: str | None
    calibrate: tuple[str, ...]
    mapping: str | None
    label_field: str


@dataclass(frozen=True, kw_only=True)
class RetryOptions(IndexOptions):
    """Flags of `beamsight retry`."""

    allowed_schemes: tuple[str, ...]
    files_per_shard: int
    device: str
    trust_remote_code: bool
    batch_size: int | None


@dataclass(frozen=True, kw_only=True)
class HistoryOptions(CatalogOptions):
    """Flags of `beamsight history`."""

    last: int
    json: bool


@dataclass(frozen=True, kw_only=True)
class RollbackOptions(CatalogOptions):
    """Flags of `beamsight rollback`."""

    run_id: str


@dataclass(frozen=True, kw_only=True)
class CleanOptions(CatalogOptions):
    """Flags of `beamsight clean`."""

    older_than: timedelta
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class SearchOptions(CatalogOptions):
    """Flags of `beamsight search`."""

    query: tuple[str, ...]
    image: tuple[str, ...]
    queries: str | None
    k: int
    where: str | None
    param: dict[str, str]
    json: bool
    html: str | None
    model: str | None
    device: str
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class InspectOptions(CatalogOptions):
    """Flags of `beamsight inspect`."""

    json: bool


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(RunningOptions):
    """Flags of `beamsight doctor`; none is needed."""

    catalog: str | None
    model: tuple[str, ...]
    input: tuple[str, ...]
    load: bool
    trust_remote_code: bool
    json: bool
    storage_options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FetchModelOptions:
    """Flags of `beamsight fetch-model`."""

    model: str
    to: str
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CatalogOptions):
    """Flags of `beamsight export`. `per` and `creator_type` are for `jsonld`, `sitemap_url` for `sitemap`,
    `product_field` and `titles` for `merchant`, `raw_texts` for `csv`."""

    format: str
    output: str
    report: str | None
    review: str
    base_url: str | None
    url_path: str
    uri_prefix: str | None
    page_url: str | None
    per: str
    creator_type: str
    sitemap_url: str | None
    product_field: str | None
    titles: bool
    raw_texts: bool


def parse_build(argv: Sequence[str]) -> BuildOptions:
    parser = _parser("build", "Reads images, runs the models, writes the catalog and its index.")
    add = parser.add_argument
    _add_reading(parser)
    add("--catalog", required=True, metavar="DIR", help="where the catalog is or will be: a directory, s3:// or gs://")
    add("--ops", type=_names, metavar="OP[,OP]",
        help="what to compute: ops, and the words default and tagging for groups of them "
             f"(default: default, those of {','.join(DEFAULT_OPS)} that the model serves; "
             f"tagging: {','.join(OP_GROUPS['tagging'])}; also: caption_match)")  # fmt: skip
    for op, flag in MODEL_FLAGS.items():
        add(f"--{flag}", metavar="SPEC", help=f"model of the op {op} (default: that of --model)")
    add("--max_failure_rate", type=_fraction, default=0.05,
        help="publish nothing, and exit with 3, when a larger share of the images fails (default: %(default)s)")  # fmt: skip
    add("--prune", action="store_true",
        help="remove from the catalog what is not among the inputs (any more)")  # fmt: skip
    add("--verify_content", action="store_true",
        help="read all inputs and compare their bytes, instead of trusting sizes, times and etags")  # fmt: skip
    add("--no_recompute", action="store_true",
        help="stop, instead of computing all images anew, where these options make another recipe than the catalog's")  # fmt: skip
    add("--dry_run", action="store_true", help="say what would be done, and do nothing")
    _add_running(parser)
    args, beam_args = parser.parse_known_args(argv)
    _check_running(parser, args, beam_args)
    return BuildOptions(**{**vars(args), "input": tuple(args.input), "beam_args": tuple(beam_args)})


def parse_evaluate(argv: Sequence[str]) -> EvaluateOptions:
    parser = _parser("evaluate", "Measures a model on images with captions or labels, or the tags of a catalog.")
    add = parser.add_argument
    add("task", choices=("retrieval", "zero-shot", "captions", "matcher", "tags", "drift"),
        help="retrieval: captions find their image, images their captions; zero-shot: the best of all labels; "
             "captions: those that the model gives, against those of the images and against their metadata; "
             "matcher: own captions are told from others; "
             "tags: the categories of a tagged catalog, against labels that came with its images; "
             "drift: vectors by --dtype, --engine, --device and --compile, against those by torch in float32 on the CPU")  # fmt: skip
    _add_reading(parser, is_optional=True)
    group = parser.add_argument_group("tags").add_argument
    group("--catalog", metavar="DIR", help="the tagged catalog, in place of --input")
    group("--mapping", metavar="FILE",
        help="YAML that says which category a label means, such as `Tea: Food & Drink > Non-Alcoholic Beverages`")  # fmt: skip
    group("--taxonomy", default=DEFAULT_TAXONOMY, metavar="SPEC",
        help="what it was tagged with: a built-in taxonomy or a file (default: %(default)s)")  # fmt: skip
    group = parser.add_argument_group("zero-shot").add_argument
    group(
        "--label_field",
        default="label",
        help="metadata field that holds the label, for tags too (default: %(default)s)",
    )
    group("--template", action="append", default=[],
        help="text of a label, {} standing for it; several are averaged (default: 'a photo of a {}')")  # fmt: skip
    group = parser.add_argument_group("captions").add_argument
    group("--mention", type=_names, action="extend", default=[], metavar="FIELD[,FIELD]",
        help="metadata fields whose value a caption should name; the share that does is measured")  # fmt: skip
    group("--synonyms", metavar="FILE",
        help='JSON of other words for values of these fields, such as {"Tshirts": ["t-shirt", "tee"]}')  # fmt: skip
    group("--never", type=_names, action="extend", default=[], metavar="WORD[,WORD]",
        help="words that no caption should use, such as man,woman,person where there are no people; "
             "the share that does is measured")  # fmt: skip
    add("--json", action="store_true", help="as one JSON object")
    add(
        "--html", metavar="FILE", help="also write examples, such as the best and the worst, as one self-contained page"
    )
    _add_threads(parser)
    args = parser.parse_args(argv)
    _check_evaluated(parser, args)
    templates = tuple(args.template) or ("a photo of a {}",)
    if wrong := [template for template in templates if "{}" not in template]:
        parser.error(f"argument --template: {{}} must stand for the label, got {wrong[0]!r}")
    if args.task != "captions" and (args.mention or args.synonyms or args.never):
        parser.error(f"--mention, --synonyms and --never are for captions, not for {args.task}")
    if args.synonyms and not args.mention:
        parser.error("--synonyms needs --mention, the metadata fields whose values it has other words for")
    lists = {name: tuple(dict.fromkeys(getattr(args, name))) for name in ("input", "mention", "never")}
    return EvaluateOptions(**{**vars(args), **lists, "template": templates})


def _check_evaluated(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Whether there is something to measure, of the right kind."""
    if args.task != "tags" and (args.catalog or args.mapping):
        parser.error(f"--catalog and --mapping are for tags, not for {args.task}")
    if args.task != "tags" and not args.input:
        parser.error("the following arguments are required: --input")
    if args.task == "tags" and args.input:
        parser.error("tags are read from --catalog; leave out --input")
    if args.task == "tags" and not (args.catalog and args.mapping):
        parser.error("tags needs --catalog, a tagged catalog, and --mapping, which says what its labels mean")


def parse_score(argv: Sequence[str]) -> ScoreOptions:
    parser = _parser("score", "Says how likely texts describe images: given ones, or the captions of a corpus.")
    add = parser.add_argument
    _add_reading(parser, is_optional=True)
    add("--image", action="append", default=[], metavar="FILE", help="score an image; may be given several times")
    add("--text", action="append", default=[], help="with each --image; may be given several times")
    add("--json", action="store_true", help="one JSON line a pair, as always with --input")
    add("--output", metavar="FILE", help="write the JSON lines to a file, local or remote, in place of the terminal")
    _add_threads(parser)
    args = parser.parse_args(argv)
    if args.input and (args.image or args.text):
        parser.error("--input scores images with their own captions; leave out --image and --text")
    if not args.input and not (args.image and args.text):
        parser.error("nothing to score: give --image FILE and --text TEXT, or --input PATTERN")
    if not all(text.strip() for text in args.text):
        parser.error("a text is empty; give one that could describe an image")
    lists = {name: tuple(dict.fromkeys(getattr(args, name))) for name in ("input", "image", "text")}
    return ScoreOptions(**{**vars(args), **lists})


# What each kind does unless a flag says otherwise.
_TRAINING_DEFAULTS: dict[str, dict[str, Any]] = {
    "dual-encoder": {
        "model": "compact:conse", "epochs": 20, "images_per_step": 600, "captions_per_image": 2, "weight_decay": 0.05,
        "averaging": 0.0, "dropout": 0.5, "hidden_dim": 1024,
    },
    "captioner": {
        "model": "compact:aligned", "epochs": 12, "images_per_step": 50, "captions_per_image": 3, "weight_decay": 0.02,
        "averaging": 0.999, "dropout": 0.1, "hidden_dim": 256,
    },
    "matcher": {
        "model": "compact:conse", "epochs": 20, "images_per_step": 300, "captions_per_image": 2, "weight_decay": 0.05,
        "averaging": 0.99, "dropout": 0.3, "hidden_dim": 512,
    },
}  # fmt: skip
_WRITERS = ("compact", "cross-attention", "vision-encoder-decoder")
# Which kinds read the flags that not every kind reads.
READ_BY = {
    "text_model": ("dual-encoder", "matcher"),
    "pseudo_weight": ("dual-encoder", "captioner"),
    "mixing": ("dual-encoder",),
    **dict.fromkeys(
        (
            "writer", "language_model", "objective", "start", "start_share", "num_beams", "num_judged", "label_margin",
            "min_word_count",
        ),
        ("captioner",),
    ),
}  # fmt: skip


def parse_train(argv: Sequence[str]) -> TrainOptions:
    parser = _parser("train", "Trains a model on images with captions, and writes a model directory.",
                     epilog="Flags may also stand in a file, read where its name is given as @FILE.",
                     fromfile_prefix_chars="@")  # fmt: skip
    add = parser.add_argument
    add("kind", choices=tuple(_TRAINING_DEFAULTS),
        help="dual-encoder: aligns images and texts; captioner: writes sentences; matcher: says whether image and text match")  # fmt: skip
    _add_reading(parser, model_default=f"{_defaults_of('model')}; need no download", takes_models=False)
    add("--validation", nargs="+", action="extend", required=True, metavar="PATTERN",
        help="images with captions that are not trained on; of the same kinds as --input")  # fmt: skip
    add("--caption_template", metavar="FILE",
        help="Jinja template whose lines are the captions of images that bring none, made of their metadata")  # fmt: skip
    add("--output", required=True, metavar="DIR", help="the model directory to write; use it as --model dir:DIR")
    _add_training_models(parser.add_argument_group("what is trained"))
    _add_training_recipe(parser.add_argument_group("how it is trained"))
    _add_threads(parser)
    parser.set_defaults(model=None)
    args = parser.parse_args(argv)
    for name, kinds in READ_BY.items():
        if args.kind not in kinds and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for {' and '.join(kinds)}, and a {args.kind} does not read it; leave it out")
    for name, value in _TRAINING_DEFAULTS[args.kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.text_model = args.text_model or args.model
    args.writer = args.writer or ("cross-attention" if args.language_model else "compact")
    _check_writer(parser, args)
    return TrainOptions(**{**vars(args), "input": tuple(args.input), "validation": tuple(args.validation)})


def _add_training_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--text_model", metavar="SPEC", help="the text side of a dual encoder or matcher (default: that of --model)")
    add("--finetune", type=_sides, default=frozenset(), metavar="SIDE[,SIDE]",
        help="train the image or text model below as well, or both: image,text (default: both stay as they are)")  # fmt: skip
    add("--writer", choices=_WRITERS,
        help="captioner: the small decoder of this program; a language model that reads image features by cross-attention; "
             "or an image transformer and a language model trained as one (default: compact, or cross-attention with "
             "--language_model)")  # fmt: skip
    add("--language_model", metavar="SPEC", help="captioner: a causal language model, such as hf:gpt2")
    add("--start", metavar="DIR", help="captioner: begin with the weights of this model directory, of the same shapes")
    add("--start_share", type=_fraction, default=0.0,
        help="captioner: how much of those weights is mixed into what training makes of them (default: %(default)s)")  # fmt: skip
    add(
        "--hidden_dim", type=_positive_int, help=f"width of the trained network (default: {_defaults_of('hidden_dim')})"
    )
    add("--num_beams", type=_positive_int, default=3,
        help="captioner: sentences that its search follows when it is used (default: %(default)s)")  # fmt: skip
    add("--num_judged", type=_positive_int, default=2,
        help="captioner: how many of them the model below chooses from, where it aligns images and texts (default: %(default)s)")  # fmt: skip
    add("--label_margin", type=_finite_float, default=0.0,
        help="captioner: by how much \"a photo of a CLASS\" must fit better than they do, to be chosen (default: %(default)s)")  # fmt: skip
    add("--min_word_count", type=_positive_int, default=5,
        help="captioner: rarer words are left out of the small decoder's vocabulary (default: %(default)s)")  # fmt: skip


def _add_training_recipe(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=_positive_int, help=f"passes over the images (default: {_defaults_of('epochs')})")
    add(
        "--images_per_step",
        type=_positive_int,
        help=f"images a training step (default: {_defaults_of('images_per_step')})",
    )
    add("--captions_per_image", type=_positive_int,
        help=f"captions of each image in a step (default: {_defaults_of('captions_per_image')})")  # fmt: skip
    add("--learning_rate", type=_positive_float, default=1e-3,
        help="highest rate of the schedule; a fine-tuned model below has a tenth (default: %(default)s)")  # fmt: skip
    add("--weight_decay", type=_fraction, help=f"of AdamW (default: {_defaults_of('weight_decay')})")
    add(
        "--averaging",
        type=_fraction,
        help=f"decay of the average of the weights that is kept; 0: the last (default: {_defaults_of('averaging')})",
    )
    add("--dropout", type=_fraction, help=f"less for more data (default: {_defaults_of('dropout')})")
    add("--mirrored", action="store_true", help="turn every other image left to right, drawn anew each epoch")
    add("--mixing", type=_weight, default=0.0,
        help="dual-encoder: weight of the loss on images and captions mixed in pairs, which helps small corpora (default: %(default)s)")  # fmt: skip
    add("--objective", default="likelihood", choices=("likelihood", "cider"),
        help="captioner: the likelihood of the captions, or CIDEr-D of what it writes itself, for one that can write "
             "already (default: %(default)s)")  # fmt: skip
    add("--pseudo_weight", type=_weight, default=0.0,
        help="weight of the loss on images of the model's classes that are made without photos, so that what its "
             "captions never name is not forgotten (default: %(default)s)")  # fmt: skip
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="what is computed in (default: %(default)s, bfloat16 where the processor has it)")  # fmt: skip
    add("--licence", default="", metavar="TEXT", help="what the model card says of the data's licence")
    add("--seed", type=_seed, default=0, help="same seed, same result on the same machine (default: %(default)s)")


def _check_writer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.writer != "compact" and not args.language_model:
        parser.error(f"--writer {args.writer} needs --language_model, such as hf:gpt2")
    if args.writer == "compact" and args.language_model:
        parser.error("--language_model is not read by --writer compact; leave one of them out")
    if args.start_share and not args.start:
        parser.error("--start_share is of the weights to begin with; name them with --start DIR")
    if args.objective == "cider" and not args.start:
        parser.error("--objective cider is for a captioner that can write already; name it with --start DIR")
    if args.objective == "cider" and args.writer != "compact":
        parser.error(f"--objective cider is for the compact writer; train {args.writer} with --objective likelihood")
    if args.kind == "captioner" and "text" in args.finetune:
        parser.error("--finetune text: a captioner has no text side; its language model is always trained")


def _defaults_of(name: str) -> str:
    """What a flag is for each kind, unless it is given."""
    return ", ".join(f"{kind} {values[name]}" for kind, values in _TRAINING_DEFAULTS.items())


def _sides(text: str) -> frozenset[str]:
    sides = frozenset(_names(text))
    if wrong := sides - {"image", "text"}:
        raise argparse.ArgumentTypeError(f"must be image, text or image,text, got {', '.join(sorted(wrong))!r}")
    return sides


def parse_index(argv: Sequence[str]) -> IndexOptions:
    parser = _parser("index", "Makes a new index from the catalog's table, without touching an image.")
    _add_catalog(parser)
    _add_storage(parser)
    _add_running(parser)
    args, beam_args = parser.parse_known_args(argv)
    _check_running(parser, args, beam_args)
    return IndexOptions(**vars(args), beam_args=tuple(beam_args))


def parse_tag(argv: Sequence[str]) -> TagOptions:
    parser = _parser("tag", "Says of every image of a catalog what a page, a feed or an ad server wants to know: alt text, title, "
                     "keywords, categories, suitability, ad slots. Reads no picture; what is new or changed is tagged.")  # fmt: skip
    _add_catalog(parser)
    add = parser.add_argument
    add("--taxonomy", default=DEFAULT_TAXONOMY, metavar="SPEC",
        help="of the categories: %(default)s, or a file: IAB's TSV, Google's product taxonomy, or YAML (default: %(default)s)")  # fmt: skip
    add("--max_categories", type=_positive_int, default=DEFAULT_MAX_CATEGORIES,
        help="at most so many categories an image (default: %(default)s)")  # fmt: skip
    add("--min_score", type=_fraction, default=DEFAULT_MIN_SCORE,
        help="leave out categories that are less likely; with a high one, more images have none (default: %(default)s)")  # fmt: skip
    add("--text_model", metavar="SPEC",
        help="language model with a chat template that writes title, description and keywords, such as hf:PATH (default: templates)")  # fmt: skip
    _add_device(parser, "where it runs")
    _add_trust(parser)
    add("--all", action="store_true", help="tag all images anew, not only what is new or changed")
    add("--dry_run", action="store_true", help="say what would be done, and do nothing")
    group = parser.add_argument_group(
        "calibration", "What turns the scores of categories into probabilities."
    ).add_argument
    group("--calibration", metavar="FILE", help="use what was fitted before (default: what comes with the encoder)")
    group("--calibrate", nargs="+", action="extend", default=[], metavar="PATTERN",
          help="first fit it on these labelled images, encoded as the catalog's are, and write it to --calibration")  # fmt: skip
    group(
        "--mapping", metavar="FILE", help="which category each label of these images means: YAML of `label: id or path`"
    )
    group("--label_field", default="label", help="metadata field that holds the label (default: %(default)s)")
    _add_storage(parser)
    _add_running(parser)
    args, beam_args = parser.parse_known_args(argv)
    _check_running(parser, args, beam_args)
    if args.calibrate and not (args.mapping and args.calibration):
        parser.error(
            "--calibrate needs --mapping, which says what the labels mean, and --calibration, the file to write"
        )
    if args.calibrate and args.dry_run:
        parser.error("--calibrate writes --calibration, and --dry_run writes nothing; leave one of them out")
    if args.mapping and not args.calibrate:
        parser.error("--mapping is for --calibrate; give that too")
    return TagOptions(**{**vars(args), "calibrate": tuple(args.calibrate), "beam_args": tuple(beam_args)})


def parse_retry(argv: Sequence[str]) -> RetryOptions:
    parser = _parser("retry", "Tries again what failed: images, list entries and shards of the failures table.")
    _add_catalog(parser)
    _add_allowed_schemes(parser)
    _add_files_per_shard(parser)
    _add_computing(parser)
    _add_trust(parser)
    _add_storage(parser)
    _add_running(parser)
    args, beam_args = parser.parse_known_args(argv)
    _check_running(parser, args, beam_args)
    return RetryOptions(**vars(args), beam_args=tuple(beam_args))


def parse_history(argv: Sequence[str]) -> HistoryOptions:
    parser = _parser("history", "Lists the runs that changed a catalog, newest first.")
    _add_catalog(parser)
    parser.add_argument(
        "--last", type=_positive_int, default=30, metavar="N", help="so many runs (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line a run")
    _add_storage(parser)
    return HistoryOptions(**vars(parser.parse_args(argv)))


def parse_rollback(argv: Sequence[str]) -> RollbackOptions:
    parser = _parser("rollback", "Takes table, failures and index back to what they were after a run.")
    _add_catalog(parser)
    parser.add_argument("run_id", metavar="RUN", help="a run that `beamsight history` lists")
    _add_storage(parser)
    return RollbackOptions(**vars(parser.parse_args(argv)))


def parse_clean(argv: Sequence[str]) -> CleanOptions:
    parser = _parser("clean", "Deletes what no kept state of a catalog needs.")
    _add_catalog(parser)
    parser.add_argument("--older_than", type=_duration, default=timedelta(days=14), metavar="AGE",
        help="keep every state that readers have seen since, and files written since: 14d, 36h, 90m (default: 14d); not while a run is at work, whose files may be older")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="say what would be deleted, and delete nothing")
    _add_storage(parser)
    return CleanOptions(**vars(parser.parse_args(argv)))


def parse_search(argv: Sequence[str]) -> SearchOptions:
    parser = _parser("search", "Finds images by text or by image.")
    _add_catalog(parser)
    add = parser.add_argument
    add("query", nargs="*", help='texts to search for, such as "two dogs in the snow"')
    add("--image", action="append", default=[], metavar="FILE", help="search with an image; may be given several times")
    add("--queries", metavar="FILE", help="file with one text a line, answered in one go as JSON lines")
    add("-k", type=_positive_int, default=10, help="results a query (default: %(default)s)")
    add("--where", metavar="SQL",
        help="only among images for which an SQL condition on their tags holds, such as \"suitability = 'low' and num_faces = 0\"; "
             "k results are still k (columns: docs/tags.md)")  # fmt: skip
    add("--param", action="append", type=_assignment, default=[], metavar="NAME=VALUE",
        help="value that $NAME stands for in --where, with whatever characters; may be given several times")  # fmt: skip
    add("--json", action="store_true", help="one JSON line a query")
    add("--html", metavar="FILE", help="also write the results as one self-contained page of thumbnails")
    add("--model", metavar="SPEC", help="encoder of the queries (default: the one that built the catalog)")
    _add_device(parser, "where image queries are encoded")
    _add_trust(parser)
    _add_storage(parser)
    args = parser.parse_intermixed_args(argv)
    if not (args.query or args.image or args.queries):
        parser.error("nothing to search for: give a text, --image FILE or --queries FILE")
    if not all(text.strip() for text in args.query):
        parser.error("a query is empty; give a text to search for")
    if args.param and args.where is None:
        parser.error("--param is for values in --where; give that too")
    args.param = dict(args.param)
    return SearchOptions(**{**vars(args), "query": tuple(args.query), "image": tuple(args.image)})


def parse_inspect(argv: Sequence[str]) -> InspectOptions:
    parser = _parser("inspect", "Says what is in a catalog.")
    _add_catalog(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    _add_storage(parser)
    return InspectOptions(**vars(parser.parse_args(argv)))


def parse_doctor(argv: Sequence[str]) -> DoctorOptions:
    parser = _parser("doctor", "Says whether this machine, and the runner, are ready for a run: packages, processor, cards, disk, storage, models. "
                     "Exits with 1 where something is a problem. Asks no network but the storage and the runner that are named, unless with --load.")  # fmt: skip
    add = parser.add_argument
    add("--catalog", metavar="DIR",
        help="look also whether a catalog can be here, and whether the models of its recipe can be had")  # fmt: skip
    add("--model", nargs="+", action="extend", default=[], metavar="SPEC",
        help=f"look also for these models (default: those of the catalog, or {DEFAULT_MODEL})")  # fmt: skip
    add("--input", nargs="+", action="extend", default=[], metavar="PATTERN",
        help="look also whether these can be listed and read")  # fmt: skip
    add("--load", action="store_true",
        help="load the models, fetching those that are not there, and have each encode an image and a text; on flink and "
             "dataflow also run a small job that asks the workers what they are")  # fmt: skip
    _add_device(parser)
    _add_trust(parser)
    add("--json", action="store_true", help="as one JSON object")
    _add_storage(parser)
    _add_runner(parser)
    args, beam_args = parser.parse_known_args(argv)
    _check_unknown(parser, args, beam_args)
    lists = {"model": tuple(args.model), "input": tuple(args.input), "beam_args": tuple(beam_args)}
    return DoctorOptions(**{**vars(args), "num_threads": None, **lists})


def parse_fetch_model(argv: Sequence[str]) -> FetchModelOptions:
    parser = _parser("fetch-model", "Fetches a model into a directory, and says by which spec it is used there.")
    add = parser.add_argument
    add("model", metavar="SPEC",
        help="such as hf:google/siglip2-base-patch16-224, torchvision:resnet50 or open_clip:ViT-B-32/laion2b_s34b_b79k")  # fmt: skip
    add(
        "--to",
        required=True,
        metavar="DIR",
        help="a new directory of this machine, or the one that an earlier try has begun",
    )
    add("--trust_remote_code", action="store_true", help="fetch the Python code of a hf: repository too")
    args = parser.parse_args(argv)
    if "://" in args.to:
        parser.error(f"argument --to: must be a directory of this machine, got {args.to!r}")
    return FetchModelOptions(**vars(args))


# What becomes of rows that need review unless a flag says otherwise: files for people and programs hold them, with the column
# that says so, and a sitemap says nothing but where images are; what publishes texts, or pictures as ads, does not.
EXPORT_FORMATS = {
    "jsonl": "include", "csv": "include", "jsonld": "exclude", "sitemap": "include", "merchant": "exclude", "xmp": "exclude",
}  # fmt: skip
_READ_BY_EXPORT = {
    "per": ("jsonld",),
    "creator_type": ("jsonld",),
    "sitemap_url": ("sitemap",),
    "product_field": ("merchant",),
    "titles": ("merchant",),
    "raw_texts": ("csv",),
    "page_url": ("jsonl", "csv", "jsonld", "sitemap"),
}


def parse_export(argv: Sequence[str]) -> ExportOptions:
    parser = _parser("export", "Writes the tags of a catalog for a shop, a CMS or a search engine.")
    _add_catalog(parser)
    add = parser.add_argument
    add("--format", required=True, choices=tuple(EXPORT_FORMATS),
        help="jsonl or csv: all tags; jsonld: schema.org ImageObject; sitemap: image sitemaps; merchant: image attributes "
             "of products for Google Merchant Center; xmp: sidecars with IPTC fields")  # fmt: skip
    add("--output", required=True, metavar="PATH",
        help="the file to write (jsonl, csv, merchant: .xml or .tsv) or the folder (jsonld, sitemap, xmp), local or remote")  # fmt: skip
    add("--report", metavar="FILE", help="also write the images that are left out, with the reasons, as JSON lines")
    add("--review", choices=("include", "exclude", "only"),
        help="what becomes of images that need review (default: include for jsonl, csv and sitemap, exclude for jsonld, merchant and xmp)")  # fmt: skip
    _add_addresses(parser.add_argument_group("where images and pages are on the web"))
    group = parser.add_argument_group("formats").add_argument
    group("--per", choices=("image", "page"), default="image",
        help="jsonld: a document an image, or one a page with all its images (default: %(default)s)")  # fmt: skip
    group("--creator_type", choices=("Person", "Organization"), default="Person",
        help="jsonld: what the creators that the images came with are (default: %(default)s)")  # fmt: skip
    group("--sitemap_url", type=_folder_url, metavar="URL",
        help="sitemap: where the files of --output will be served; pages must be below it (default: the root of "
             "--page_url, else of --base_url)")  # fmt: skip
    group("--product_field", metavar="FIELD", help="merchant: metadata field that holds the id of an image's product")
    group("--titles", action="store_true",
        help="merchant: also titles that a model wrote, as structured_title that says so")  # fmt: skip
    group("--raw_texts", action="store_true",
        help="csv: no apostrophe before texts that a spreadsheet would run as a formula; for programs")  # fmt: skip
    _add_storage(parser)
    args = parser.parse_args(argv)
    for name, formats in _READ_BY_EXPORT.items():
        if args.format not in formats and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for {' and '.join(formats)}, and {args.format} does not read it; leave it out")
    _check_export(parser, args)
    args.review = args.review or EXPORT_FORMATS[args.format]
    return ExportOptions(**vars(args))


def _add_addresses(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base_url", type=_folder_url, metavar="URL",
        help="where the images are served, such as https://cdn.example.com/photos/ (not needed for images read from the web)")  # fmt: skip
    add("--url_path", choices=("uri", "member", "slug"), default="uri",
        help="what follows it: the path of the URI below --uri_prefix, in which a shard counts as a folder; the name inside "
             "the shard; or the slug with the format's suffix (default: %(default)s)")  # fmt: skip
    add("--uri_prefix", metavar="URI",
        help="what URIs of the catalog begin with and URLs do not have (default: the folder that all images share; name it "
             "where URLs must stay the same while the catalog grows)")  # fmt: skip
    add("--page_url", type=_page_template, metavar="TEMPLATE",
        help="page of an image whose metadata has no page_url: a URL with {slug}, {key}, {image_id}, {path} or "
             "the name of a metadata field, such as https://example.com/p/{sku}")  # fmt: skip


def _check_export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.format == "merchant":
        if not args.product_field:
            parser.error(
                "--format merchant needs --product_field, the metadata field with the id of an image's product"
            )
        if not args.output.lower().endswith((".xml", ".tsv")):
            parser.error(f"argument --output: a feed is named .xml or .tsv, got {args.output!r}")
        if args.titles and args.output.lower().endswith(".tsv"):
            parser.error("--titles is for XML; name the feed .xml")
    if args.format == "sitemap" and not args.sitemap_url:
        place = args.page_url or args.base_url
        if not place:
            parser.error("--format sitemap needs --sitemap_url, where its files will be served")
        args.sitemap_url = urljoin(place, "/")
    if args.url_path == "slug" and args.uri_prefix:
        parser.error("--uri_prefix has no meaning with --url_path slug; leave one of them out")


class _Parser(argparse.ArgumentParser):
    """A parser of flags, which may also stand in a YAML file; those on the command line win.

    What a key of the file means is asked of the flag's own action, so there is no second list of flags.
    """

    takes_beam_flags = False

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """A file of flags is written like a command line, over several lines and with comments."""
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        """One line, without the usage of all flags above it."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self._with_config(super().parse_known_args, args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self._with_config(super().parse_known_intermixed_args, args, namespace)

    def _with_config(self, parse: Callable[..., Any], args: Any, namespace: Any) -> Any:
        path, args = self._split_off("--config", args)
        if path is None:
            return parse(args, namespace)
        values = self._read_config(path)
        own = self._own_flags()
        others = {name: value for name, value in values.items() if name not in own}
        if others and not self.takes_beam_flags:
            self._fail_unknown(path, next(iter(others)))
        if dashed := next((name for name in others if name.startswith("-")), None):
            self.error(f"{path}: {dashed}: flags stand there without their dashes")
        given = {own[name].dest: self._value(path, name, own[name], values[name]) for name in values if name in own}
        if others and (self._split_off("--runner", args)[0] or given.get("runner", "local")) == "local":
            self._check_beam_flags(path, others)
        with self._taken_as_given(given):
            namespace, rest = parse(args, namespace)
        for dest, value in given.items():
            if not hasattr(namespace, dest):
                setattr(namespace, dest, value)
        on_command_line = {arg.partition("=")[0] for arg in rest}
        beam_args = [arg for name, value in others.items() if f"--{name}" not in on_command_line
                     for arg in self._beam_args(path, name, value)]  # fmt: skip
        return namespace, beam_args + rest

    def _split_off(self, flag: str, args: Any) -> tuple[str | None, list[str]]:
        """The value of one flag, and the other arguments."""
        parser = argparse.ArgumentParser(self.prog, add_help=False, allow_abbrev=False)
        parser.error = self.error  # type: ignore[method-assign]
        parser.add_argument(flag, dest="found", action="append", default=[])
        known, rest = parser.parse_known_args(args)
        if len(known.found) > 1:
            self.error(f"argument {flag}: must be given once, got {' and '.join(known.found)}")
        return (known.found[0] if known.found else None), rest

    def _read_config(self, path: str) -> dict[str, Any]:
        import yaml

        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
            node = yaml.compose(text, yaml.SafeLoader)
            values = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            self.error(f"argument --config: cannot read {path!r}: {getattr(error, 'strerror', None) or error}")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            self.error(f"{path}: not YAML: {place}{error.problem}")
        except yaml.YAMLError as error:
            self.error(f"{path}: not YAML: {str(error).splitlines()[0]}")
        if values is None:
            return {}
        if not isinstance(values, dict):
            self.error(f"{path}: must be lines of `flag: value`, not {_kind_of(values)}")
        names = [key.value for key, _ in node.value] if node else []
        for name in names:
            if names.count(name) > 1:
                self.error(f"{path}: {name}: stands there more than once")
        try:
            return {str(name): _with_environment(value) for name, value in values.items()}
        except KeyError as error:
            name = next(
                key for key, value in values.items() if f"${{{error.args[0]}}}" in json.dumps(value, default=str)
            )
            self.error(f"{path}: {name}: ${{{error.args[0]}}} is not set in the environment")

    def _own_flags(self) -> dict[str, argparse.Action]:
        """Actions by the names that they have in a file."""
        actions = [action for action in self._actions if action.dest not in ("help", argparse.SUPPRESS)]
        return {(action.option_strings or [action.dest])[-1].lstrip("-"): action for action in actions}

    def _value(self, path: str, name: str, action: argparse.Action, value: Any) -> Any:
        """What the flag would be, were it given on the command line with this value."""
        namespace = argparse.Namespace()
        try:
            for texts in _texts_of(action, value):
                action(self, namespace, self._get_values(action, texts), None)
        except argparse.ArgumentError as error:
            self.error(f"{path}: {name}: {error.message}")
        return getattr(namespace, action.dest, action.default)

    @contextlib.contextmanager
    def _taken_as_given(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Flags of the file are not required of the command line, and show whether it has them all the same."""
        positionals = [action.dest for action in self._actions if not action.option_strings]
        actions = [action for action in self._actions if action.dest in given]
        settings = [(action, action.default, action.required, action.nargs) for action in actions]
        all_actions, defaults = list(self._actions), dict(self._defaults)
        for action in actions:
            action.required = False
            self._defaults.pop(action.dest, None)
            if action.option_strings:
                action.default = argparse.SUPPRESS
            elif action.dest == positionals[-1]:
                action.default, action.nargs = given[action.dest], action.nargs or argparse.OPTIONAL
            else:  # whatever stands on the command line belongs to those behind it
                self._actions.remove(action)
        try:
            yield
        finally:
            self._actions[:] = all_actions
            self._defaults.update(defaults)
            for action, *values in settings:
                action.default, action.required, action.nargs = values

    def _fail_unknown(self, path: str, name: str) -> NoReturn:
        close = difflib.get_close_matches(name, self._own_flags(), 1)
        self.error(f"{path}: {name}: no such flag" + (f"; did you mean {close[0]}?" if close else ""))

    def _check_beam_flags(self, path: str, values: Mapping[str, Any]) -> None:
        from pipelines.runners import unknown_beam_args

        for name, value in values.items():
            try:
                unknown = unknown_beam_args(self._beam_args(path, name, value))
            except ValueError as error:
                self.error(f"{path}: {name}: {error}")
            if unknown:
                self._fail_unknown(path, name)

    def _beam_switch(self, path: str, name: str, value: bool) -> list[str]:
        from pipelines.runners import beam_actions

        actions = beam_actions()
        if (action := actions.get(f"--{name}")) and action.nargs != 0:
            self.error(
                f"{path}: {name}: must be a value, got the switch {json.dumps(value)}; put it in quotes if it is a text"
            )
        if value:
            return [f"--{name}"]
        return [f"--no_{name}"] if f"--no_{name}" in actions else []

    def _beam_args(self, path: str, name: str, value: Any) -> list[str]:
        if isinstance(value, bool):
            return self._beam_switch(path, name, value)
        if value is None:
            self.error(f"{path}: {name}: has no value")
        if isinstance(value, list):
            return [f"--{name}={each}" for each in value]
        return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _texts_of(action: argparse.Action, value: Any) -> list[list[str]]:
    """A value of a YAML file in the words of a command line: the arguments of each time that the flag is given.

    Raises:
        argparse.ArgumentError: The value is of another kind than the flag.
    """

    def refuse(wanted: str) -> NoReturn:
        raise argparse.ArgumentError(
            action, f"must be {wanted}, got {_kind_of(value)} {json.dumps(value, default=str)}"
        )

    if action.nargs == 0:
        if not isinstance(value, bool):
            refuse("true or false")
        return [[]] if value else []
    if isinstance(value, dict):
        return [[json.dumps(value)]] if action.type is _json_object else refuse("a value")
    is_list = isinstance(value, list)
    items = value if is_list else [value]
    if not items or any(item is None or isinstance(item, (bool, list, dict)) for item in items):
        refuse("one value, or a list of them" if is_list else "a value")
    texts = [str(item) for item in items]
    if action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE):
        return [texts]
    if isinstance(action, argparse._AppendAction):  # and those that extend
        return [[text] for text in texts]
    if is_list and action.type not in (_names, _sides):
        refuse("one value")
    return [[",".join(texts)]]


def _kind_of(value: Any) -> str:
    kinds = {bool: "the switch", dict: "the mapping", list: "the list", str: "the text", type(None): "nothing:"}
    return kinds.get(type(value), "the number" if isinstance(value, (int, float)) else f"the {type(value).__name__}")


def _with_environment(value: Any) -> Any:
    """The value with each ${NAME} replaced from the environment; $${NAME} is left as ${NAME}.

    Raises:
        KeyError: There is no such variable.
    """
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: found[0][1:] if found[1] else os.environ[found[2]], value)
    if isinstance(value, list):
        return [_with_environment(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_environment(item) for name, item in value.items()}
    return value


def input_config(options: ReadingOptions, patterns: Sequence[str]) -> InputConfig:
    """What to read, in the words of `vlm_ops.inputs`."""
    from vlm_ops.inputs import InputConfig

    return InputConfig(
        patterns=tuple(patterns),
        format=options.input_format,
        uri_column=options.uri_column,
        caption_field=options.caption_field,
        image_column=options.image_column,
        allowed_schemes=options.allowed_schemes,
        files_per_shard=options.files_per_shard,
        storage_options=options.storage_options,
    )


def recipe_of(options: ReadingOptions, ops: tuple[OpSpec, ...]) -> Recipe:
    """The ops with every flag that decides what a row contains."""
    return Recipe(ops, options.max_image_bytes, options.max_image_pixels, options.caption_field, options.image_column)


def model_choice(options: ReadingOptions) -> ModelChoice:
    """Which models serve the ops, in the words of `vlm_ops.ops`.

    Raises:
        ValueError: They cannot be run that way here.
    """
    from vlm_ops.ops import ModelChoice

    of_ops = {op: spec for op, flag in MODEL_FLAGS.items() if (spec := getattr(options, flag, None)) is not None}
    is_here = getattr(options, "runner", "local") == "local"
    return ModelChoice(options.model, of_ops, planned(model_settings(options), is_here))


def model_settings(options: Any) -> ModelSettings:
    """How models run, as far as a command has flags for it."""
    names = [each.name for each in fields(ModelSettings)]
    if not isinstance(options, ModelOptions):
        names = ["device", "trust_remote_code"]
    return ModelSettings(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def read_config(options: ReadingOptions) -> ReadConfig:
    """How to read it, in the words of `vlm_ops.shards`."""
    from vlm_ops.shards import ReadConfig

    return ReadConfig(options.max_image_bytes, options.image_column, options.caption_field, options.storage_options)


def _parser(command: str, description: str, **settings: Any) -> _Parser:
    parser = _Parser(f"beamsight {command}", description=description, allow_abbrev=False, **settings)
    parser.add_argument("--config", metavar="FILE.yaml", dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
        help="read flags from a file of `flag: value` lines; those on the command line win")  # fmt: skip
    return parser


def _add_catalog(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", metavar="CATALOG", help="the catalog's directory or URI")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage_options", type=_json_object, default={}, metavar="JSON",
        help='options for fsspec, such as \'{"endpoint_url": "https://..."}\'; credentials come from the environment by default',
    )  # fmt: skip


def _add_reading(
    parser: argparse.ArgumentParser,
    is_optional: bool = False,
    model_default: str = "%(default)s, which needs no download",
    takes_models: bool = True,
) -> None:
    add = parser.add_argument
    add("--input", nargs="+", action="extend", required=not is_optional, default=[], metavar="PATTERN",
        help="folders, globs, {brace..patterns} or files: images, WebDataset tars (plain or gz), Parquet with image bytes, "
             "lists of image URIs (JSONL, CSV, Parquet); local, s3://, gs:// or any other fsspec filesystem")  # fmt: skip
    add("--input_format", default="auto", choices=INPUT_FORMATS, help="force the format of all inputs")
    add("--uri_column", help="column or field of a list that holds the image URIs (default: found by its name)")
    add("--image_column", help="Parquet column that holds the image bytes (default: found by name and type)")
    add("--caption_field", help="metadata field or column that holds captions (default: found by its name)")
    _add_allowed_schemes(parser)
    _add_files_per_shard(parser)
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="SPEC",
        help=f"model spec (default: {model_default})",
    )
    _add_computing(parser)
    if takes_models:
        _add_models(parser)
    add("--max_image_bytes", type=_positive_int, default=DEFAULT_MAX_IMAGE_BYTES,
        help="larger files fail (default: %(default)s)")  # fmt: skip
    add("--max_image_pixels", type=_positive_int, default=DEFAULT_MAX_IMAGE_PIXELS,
        help="larger images fail (default: %(default)s)")  # fmt: skip
    _add_storage(parser)


def _add_allowed_schemes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allowed_schemes", type=_names, default=(), metavar="S[,S]",
        help="schemes that listed URIs may have (default: the list's own)")  # fmt: skip


def _add_files_per_shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files_per_shard", type=_positive_int, default=FILES_PER_SHARD,
        help="single files that make one unit of work (default: %(default)s)")  # fmt: skip


def _add_computing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_device(parser)
    add("--batch_size", type=_positive_int, help="images a batch (default: 16 on a CPU, 128 on a GPU)")


def _add_device(parser: argparse.ArgumentParser, what: str = "where the models run") -> None:
    parser.add_argument("--device", type=_device, default="auto", metavar="DEVICE",
        help=f"{what}: cpu, cuda, cuda:N, or auto, a GPU where there is one (default: %(default)s)")  # fmt: skip


def _add_trust(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--trust_remote_code", action="store_true",
        help="run the code that lies in a model's repository; it can do whatever you can")  # fmt: skip


def _add_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how models run").add_argument
    add("--dtype", default="auto", choices=DTYPES,
        help="what models compute in; auto: float32 on CPUs, bfloat16 on GPUs that have it; int8: image towers on CPUs (default: %(default)s)")  # fmt: skip
    add("--engine", default="auto", choices=ENGINES,
        help="what runs image and text towers; auto: onnxruntime on CPUs where it is exact, else torch (default: %(default)s)")  # fmt: skip
    add("--compile", action="store_true", help="let torch compile the image towers: minutes once, then faster")
    add("--caption_prompt", metavar="TEXT", help="what a captioner is told (default: what its family is usually told)")
    add("--max_new_tokens", type=_positive_int, metavar="N", help="most tokens of a caption (default: the family's)")
    add("--num_beams", type=_positive_int, metavar="N", help="beams of the search for a caption (default: the model's)")
    _add_trust(parser)


def _device(text: str) -> str:
    try:
        check(ModelSettings(device=text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _add_threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--num_threads", type=_positive_int,
        help=f"threads of a process (default: the cores of the machine at work, {usable_cores()} here)")  # fmt: skip


def _add_running(parser: _Parser) -> None:
    group = _add_runner(parser)
    group.add_argument(
        "--print_beam_flags", action="store_true", help="print the flags that Beam is given, and do nothing"
    )
    _add_threads(group)


def _add_runner(parser: _Parser) -> argparse._ArgumentGroup:
    parser.takes_beam_flags = True
    group = parser.add_argument_group("running", "Any other flag goes to Apache Beam.")
    group.add_argument("--runner", default="local", type=_runner,
        help="local, flink, dataflow, or the name of a Beam runner, whose flags are then all given (default: %(default)s)")  # fmt: skip
    return group


def _check_running(parser: argparse.ArgumentParser, args: argparse.Namespace, beam_args: list[str]) -> None:
    """Checks the flags that belong to Beam, or prints them, and ends, where that is asked for."""
    prints = args.__dict__.pop("print_beam_flags")
    _check_unknown(parser, args, beam_args)
    if args.runner == "local" and not prints:
        return
    from pipelines.runners import beam_flags, check_flags

    command, device = parser.prog.split()[-1], getattr(args, "device", "cpu")
    options = RunningOptions(
        runner=args.runner, num_threads=args.num_threads, device=device, beam_args=tuple(beam_args)
    )
    if prints:
        print("\n".join(map(shlex.quote, beam_flags(command, options))))
        parser.exit()
    places = [("CATALOG", args.catalog), *(("--input", pattern) for pattern in getattr(args, "input", ()))]
    try:
        check_flags(command, options, places)
    except ValueError as error:
        parser.error(f"--runner {args.runner}: {error}")


def _check_unknown(parser: argparse.ArgumentParser, args: argparse.Namespace, beam_args: list[str]) -> None:
    """Flags that neither we nor Beam know are typing errors. Flink's job server has flags of its own, which only it can
    check; so only what is nearly a known one is refused."""
    if not beam_args and args.runner == "local":
        return
    from pipelines.runners import PRESETS, beam_actions, check_runner, unknown_beam_args

    try:
        check_runner(args.runner)
        unknown = unknown_beam_args(beam_args)
    except ValueError as error:
        parser.error(str(error))
    own = [flag for action in parser._actions for flag in action.option_strings]
    for flag in unknown if args.runner in PRESETS else ():
        close = difflib.get_close_matches(flag.partition("=")[0], [*own, *beam_actions()], 1, cutoff=0.8)
        if args.runner != "flink" or (close and flag.startswith("--")):
            parser.error(f"unknown flag {flag!r}" + (f"; did you mean {close[0]}?" if close else ""))
    if (
        args.runner == "local"
        and "--num_threads" in own
        and any(flag.partition("=")[0] == "--num_workers" for flag in beam_args)
    ):
        parser.error("--num_workers is of Dataflow's machines; did you mean --num_threads?")


def _runner(text: str) -> str:
    """Presets in whatever case; the names of Beam's runners as they are."""
    return text.lower() if text.lower() in ("local", "flink", "dataflow") else text


def _number(kind: Callable[[str], Any], must: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """The type of a flag: a number for which something must hold, and the words that say so."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must {must}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse shows it in its messages
    return parse


_positive_int = _number(int, "be at least 1", lambda value: value >= 1)
_seed = _number(int, "not be negative", lambda value: value >= 0)
_finite_float = _number(float, "be finite", math.isfinite)
_positive_float = _number(float, "be above 0", lambda value: 0 < value < math.inf)
_weight = _number(_finite_float, "not be negative", lambda value: value >= 0)
_fraction = _number(float, "be in [0, 1]", lambda value: 0 <= value <= 1)
_fraction.__name__ = "fraction"


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(d|h|m)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"must be a number of days, hours or minutes, such as 14d, 36h or 90m, got {text!r}"
        )
    return timedelta(**{{"d": "days", "h": "hours", "m": "minutes"}[match[2]]: float(match[1])})


def _assignment(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def _folder_url(text: str) -> str:
    from vlm_ops.exports.urls import folder_url

    return _checked(folder_url, text)


def _page_template(text: str) -> str:
    from vlm_ops.exports.urls import check_template

    return _checked(check_template, text)


def _checked(check: Callable[[str], str], text: str) -> str:
    """What a check makes of a flag's text; its message becomes that of the flag."""
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("must name at least one")
    return names


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value
