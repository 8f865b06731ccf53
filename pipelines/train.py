"""`beamsight train`: a model for a corpus of one's own."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from pipelines.corpora import encode_corpus, matrix
from pipelines.options import READ_BY, TrainOptions, model_settings
from vlm_ops.cores import usable_cores
from vlm_ops.models import (
    ClassifyingBackbone,
    ModelInfo,
    describe_model,
    load_image_backbone,
    load_text_backbone,
    load_text_model,
    load_tokenizer,
    require_text_side,
)
from vlm_ops.models.caption_decoder import CaptionDecoder, DecoderConfig
from vlm_ops.models.directory import ModelDirectory, path_of
from vlm_ops.models.onnx_engine import cached_file
from vlm_ops.models.settings import resolve_device, usual_dtype
from vlm_ops.publishing import installed_version
from vlm_ops.sentences import CaptionTemplate
from vlm_ops.storage import check_writable, is_local
from vlm_ops.training.data import CaptionedImages, features_at_the_start
from vlm_ops.training.inputs import GRID_OP, MIRRORED_OP, PIXELS_OP
from vlm_ops.training.loop import Epoch, LoopConfig, Task, fit
from vlm_ops.training.model_directory import ModelCard, write_model
from vlm_ops.training.pseudo_images import PseudoImages, make_pseudo_images

logger = logging.getLogger(__name__)

_TEXTS_PER_CALL = 1024
_CHECKPOINT = "checkpoint.pt"
_LOG_SEC = 30  # between log lines where there is no terminal
# Flags that decide what a training comes to, where its kind reads them, besides those of the loop and of the task.
_FLAGS = ("writer", "language_model", "start", "start_share", "hidden_dim", "dropout", "min_word_count", "mirrored")


@dataclass(frozen=True)
class Training:
    """A task, and what becomes of its module.

    Attributes:
        finish: (trained module) -> the parts to write, the description that loads them, and figures for the card.
    """

    task: Task
    finish: Callable[[Any], tuple[dict[str, torch.nn.Module], dict[str, Any], dict[str, float]]]


def run(options: TrainOptions) -> int:
    """Encodes images and captions once, trains, and writes the model directory.

    Raises:
        ValueError: A flag is wrong, an input has no captions, or the checkpoint is of another training.
        FileNotFoundError: A pattern matches nothing.
    """
    if not is_local(options.output):
        raise ValueError(f"--output must be a local directory, got {options.output!r}; copy the model from there")
    check_writable(options.output)
    output = Path(options.output).expanduser()
    device = resolve_device(options.device)
    config = LoopConfig(
        num_epochs=options.epochs,
        batch_size=options.images_per_step,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        averaging=options.averaging,
        dtype=_dtype(options.dtype, device),
        device=device,
        seed=options.seed,
    )
    _check_models(options)
    data = caption_images(options, options.input)
    validation = caption_images(options, options.validation)
    torch.set_num_threads(options.num_threads or usable_cores())
    torch.manual_seed(options.seed)
    training = _TRAININGS[options.kind](options, data, validation, device)
    output.mkdir(parents=True, exist_ok=True)
    base, text_base = describe_model(options.model), describe_model(options.text_model)
    flags = {name: getattr(options, name) for name in _FLAGS if options.kind in READ_BY.get(name, (options.kind,))}
    flags |= {"model": base.name, "text_model": text_base.name, "finetune": sorted(options.finetune)}
    flags |= {"validation": validation.fingerprint}
    module, epochs = _fit(training.task, config, flags, output / _CHECKPOINT)
    parts, description, figures = training.finish(module)
    bases = {"base": base.spec, "base_revision": base.revision, "finetuned": sorted(options.finetune)}
    if options.kind != "captioner" and text_base != base:
        bases |= {"text_base": text_base.spec, "text_base_revision": text_base.revision}
    names = base.name if "text_base" not in bases else f"{base.name} and {text_base.name}"
    card = ModelCard(
        kind=options.kind,
        base=names,
        inputs=options.input,
        validation=options.validation,
        num_images=len(data),
        num_captions=data.num_captions,
        metric=training.task.metric,
        epochs=epochs,
        figures=figures,
        recipe={**asdict(config), **training.task.identity, **flags},
        licence=options.licence,
        version=installed_version(),
    )
    write_model(output, parts, {**bases, **description, "recipe": dict(card.recipe)}, card)
    (output / _CHECKPOINT).unlink(missing_ok=True)
    width = max(10, *map(len, figures))
    print(f"{'model':<{width}} dir:{output}")
    for name, value in figures.items():
        print(f"{name:<{width}} {value:.3f}   (on {len(validation)} validation images)")
    return 0


def _check_models(options: TrainOptions) -> None:
    """Says what cannot be trained before any image is read.

    Raises:
        ValueError: A spec is unknown, a side is missing, or the output would replace what it stands on.
        FileNotFoundError: There is no such template.
    """
    describe_model(options.model)
    _check_output(options)
    if options.caption_template is not None:
        CaptionTemplate.read(options.caption_template)
    if options.start is not None and ModelDirectory(path_of(options.start)).kind != "captioner":
        raise ValueError(
            f"--start {options.start} holds no captioner; name a directory that `train captioner` has written"
        )
    if options.kind != "captioner":
        require_text_side(options.text_model, "name a model that has one with --text_model")
    if options.writer == "vision-encoder-decoder" and options.finetune:
        raise ValueError("--writer vision-encoder-decoder is always trained as one; leave out --finetune")
    heads = DecoderConfig.num_heads
    if options.kind == "captioner" and options.writer == "compact" and options.hidden_dim % heads:
        raise ValueError(f"--hidden_dim of the compact writer must be a multiple of {heads}, got {options.hidden_dim}")


def _check_output(options: TrainOptions) -> None:
    """A model that stands in its own base's place would have none."""
    output = path_of(options.output)
    below = [options.model, options.text_model]
    while below:
        spec = below.pop()
        if not spec.startswith("dir:"):
            continue
        path = path_of(spec)
        if path == output:
            raise ValueError(
                f"--output {options.output} is the directory of {spec}, which the model stands on; name another"
            )
        config = ModelDirectory(path).config
        below += [config[side] for side in ("base", "text_base") if config.get(side)]


def _fit(
    task: Task, config: LoopConfig, flags: Mapping[str, Any], checkpoint: Path
) -> tuple[torch.nn.Module, tuple[Epoch, ...]]:
    """Trains with a bar that shows steps, loss and metric; on no terminal, a line an epoch."""
    with tqdm(unit="step", desc="train", disable=not sys.stderr.isatty()) as bar:
        started = told = time.monotonic()
        first: int | None = None

        def on_step(step: int, num_steps: int) -> None:
            nonlocal told, first
            bar.total = num_steps
            bar.update(step - bar.n)
            first = step if first is None else first
            if bar.disable and time.monotonic() - told > _LOG_SEC:
                told = time.monotonic()
                left = (told - started) / (step - first + 1) * (num_steps - step)
                logger.info("step %d of %d, time left %d s", step, num_steps, left)

        def on_epoch(epoch: Epoch) -> None:
            bar.set_postfix_str(f"loss {epoch.loss:.3f}, validation {task.metric} {epoch.score:.3f}")
            if bar.disable:
                logger.info("epoch %d of %d: loss %.3f, validation %s %.3f",
                            epoch.number, config.num_epochs, epoch.loss, task.metric, epoch.score)  # fmt: skip

        return fit(task, config, checkpoint, on_epoch, on_step, flags)


def train_dual_encoder(
    options: TrainOptions, data: CaptionedImages, validation: CaptionedImages, device: str
) -> Training:
    """Heads on the image side of --model and the text side of --text_model."""
    from vlm_ops.models.dual_encoder import DualEncoder, HeadsConfig
    from vlm_ops.training.dual_encoder import ContrastiveConfig, DualEncoderTask, calibrated, retrieval_figures

    images, texts = _backbones(options)
    dims, text_dim = _image_dims(data, images), _text_dim(data, texts)
    shapes = HeadsConfig(dims["features"], dims["embedding"], text_dim, options.hidden_dim, options.dropout)
    model = DualEncoder(shapes, images, texts)
    config = ContrastiveConfig(
        captions_per_image=options.captions_per_image, mixing=options.mixing, pseudo_weight=options.pseudo_weight
    )
    pseudo = _pseudo_images(options, data, _classifier(options, data))
    task = DualEncoderTask(model, data, validation, config, device, pseudo)

    def finish(trained: Any) -> tuple[dict[str, torch.nn.Module], dict[str, Any], dict[str, float]]:
        trained = trained.model
        task.measure_crowding(trained)
        calibration = asdict(calibrated(trained, validation, device))
        parts = {"image": trained.image, "text": trained.text, "crowding": trained.crowding, **_finetuned(trained)}
        return (
            parts,
            {"shapes": asdict(shapes), "calibration": calibration},
            retrieval_figures(trained, validation, device),
        )

    return Training(task, finish)


def train_captioner(options: TrainOptions, data: CaptionedImages, validation: CaptionedImages, device: str) -> Training:
    """A writer under the image side of --model."""
    from vlm_ops.models.captioner import Captioner, num_wanted
    from vlm_ops.models.writers import describe_writer, save_writer_files
    from vlm_ops.training.captioner import CaptionerTask, CaptioningConfig, best_sentences, captioning_figures
    from vlm_ops.training.people import fit_people

    backbone, _ = _backbones(options)
    classifier = _classifier(options, data)
    writer = _started(options, _writer(options, data, backbone, classifier, device))
    config = CaptioningConfig(
        captions_per_image=options.captions_per_image,
        pseudo_weight=options.pseudo_weight,
        objective=options.objective,
    )
    pseudo = _pseudo_images(options, data, classifier)
    task = CaptionerTask(Captioner(writer, backbone), data, validation, config, device, pseudo)
    sees_for_itself = options.writer == "vision-encoder-decoder"
    reads = [] if sees_for_itself else [name for name, dim in _image_dims(data, backbone).items() if dim]

    def finish(trained: Any) -> tuple[dict[str, torch.nn.Module], dict[str, Any], dict[str, float]]:
        _mix_with_start(options, trained.writer)
        save_writer_files(trained.writer, Path(options.output).expanduser())
        description = {
            "writer": describe_writer(trained.writer),
            "reads": reads,
            "num_beams": options.num_beams,
            "num_judged": options.num_judged,
            "label_margin": options.label_margin,
        }
        parts = {"writer": trained.writer, **_finetuned(trained)}
        sentences = best_sentences(trained, validation, options.num_beams, device, num_wanted(options.num_judged))
        log_probs = np.array([each.log_prob for each in sentences])
        description["usual_log_prob"] = float(log_probs.mean())
        if people := fit_people(data, validation, log_probs) if "features" in data.images else None:
            parts["people"] = people
        description["knows_people"] = people is not None
        return parts, description, captioning_figures(sentences, validation)

    return Training(task, finish)


def train_matcher(options: TrainOptions, data: CaptionedImages, validation: CaptionedImages, device: str) -> Training:
    """A classifier of pairs on the image side of --model and the text side of --text_model."""
    from vlm_ops.models.matcher import Matcher, MatcherConfig
    from vlm_ops.training.calibration import calibrate
    from vlm_ops.training.matcher import MatcherTask, MatchingConfig, matching_figures

    images, texts = _backbones(options)
    feature_dim, text_dim = _image_dims(data, images)["features"], _text_dim(data, texts)
    shapes = MatcherConfig(feature_dim, text_dim, options.hidden_dim, options.dropout)
    config = MatchingConfig(captions_per_image=options.captions_per_image)
    task = MatcherTask(Matcher(shapes, images, texts), data, validation, config, device)

    def finish(trained: Any) -> tuple[dict[str, torch.nn.Module], dict[str, Any], dict[str, float]]:
        scores, targets = task.scores(trained)
        calibration = calibrate(scores, targets)
        backbones = _finetuned(trained)
        trained.image_backbone = trained.text_backbone = None
        description = {"shapes": asdict(shapes), "calibration": asdict(calibration)}
        # In double precision, in which those near 0 and 1 stay apart.
        probabilities = calibration(scores.astype(np.float64))
        return {"matcher": trained, **backbones}, description, matching_figures(probabilities, targets)

    return Training(task, finish)


_TRAININGS = {"dual-encoder": train_dual_encoder, "captioner": train_captioner, "matcher": train_matcher}


def caption_images(options: TrainOptions, patterns: Sequence[str]) -> CaptionedImages:
    """All images of the patterns that have captions, as the task wants them: encoded by the base or found in the
    cache, or as pixels where the image side is fine-tuned."""
    sees_pixels = "image" in options.finetune or options.writer == "vision-encoder-decoder"
    produces = describe_model(options.model).produces
    if sees_pixels:
        columns = {"pixels": PIXELS_OP}
    else:
        columns = {"features": "features", "image_embedding": "embedding"}
        if options.kind == "captioner":
            columns["grid"] = GRID_OP
        columns = {name: op for name, op in columns.items() if op != "embedding" or "embedding" in produces}
    names = {_input_name(column): column for column in columns}
    ops, turned = list(columns.values()), {}
    if options.mirrored and patterns == options.input and not sees_pixels:
        turned = {name: f"mirrored_{name}" for name in names}
        ops.append(MIRRORED_OP)
    table, _ = encode_corpus(options, patterns, ("quality", *ops), (*names.values(), *turned.values()))
    captions = _captions(options, table)
    kept = [number for number, each in enumerate(captions) if each]
    if not kept:
        raise ValueError(
            f"no image of {' '.join(patterns)} has a caption; name their field with --caption_field, or make captions "
            "of the metadata with --caption_template"
        )
    if len(kept) < len(captions):
        logger.warning("%d images without captions are left out", len(captions) - len(kept))
        table = table.take(pa.array(kept))
    rows_of: dict[str, int] = {}
    rows = [[rows_of.setdefault(caption, len(rows_of)) for caption in captions[number]] for number in kept]
    sentences = tuple(rows_of)
    images = {name: _images_of(options, table, column) for name, column in names.items()}
    mirrored = {name: _images_of(options, table, column) for name, column in turned.items()}
    if options.mirrored and sees_pixels:
        mirrored = {"pixels": images["pixels"][..., ::-1]}
    return CaptionedImages(images, rows, sentences, _texts_of(options, sentences), mirrored)


def _captions(options: TrainOptions, table: pa.Table) -> list[list[str]]:
    """Of each image: its own captions, or those that the template makes of its metadata."""
    own = [list(dict.fromkeys(each or ())) for each in table.column("source_captions").to_pylist()]
    if options.caption_template is None:
        return own
    template = CaptionTemplate.read(options.caption_template)
    metadata = table.column("source_metadata").to_pylist()
    return [each or template.captions(meta) for each, meta in zip(own, metadata, strict=True)]


def _input_name(column: str) -> str:
    return "embedding" if column == "image_embedding" else column


def _images_of(options: TrainOptions, table: pa.Table, column: str) -> np.ndarray:
    if column not in ("grid", "mirrored_grid", "pixels"):
        return matrix(table, column)
    joined = table.column(column).combine_chunks()
    if column == "pixels":
        size = round((len(joined[0].as_py()) / 3) ** 0.5)
        return np.frombuffer(joined.buffers()[2], np.uint8).reshape(len(joined), 3, size, size)
    grid_dim = _grid_dim(describe_model(options.model))
    return np.frombuffer(joined.buffers()[2], np.float16).reshape(len(joined), -1, grid_dim)


@lru_cache(maxsize=1)
def _grid_dim(model: ModelInfo) -> int:
    """Loading a backbone for a number takes its time, so once is enough for all images of a run."""
    return load_image_backbone(model.spec).grid_dim


def _texts_of(options: TrainOptions, sentences: Sequence[str]) -> Mapping[str, np.ndarray]:
    if options.kind == "captioner":
        return {}
    if "text" in options.finetune:
        return load_tokenizer(options.text_model)(sentences)
    return {"vectors": encode_texts(options, sentences)}


def encode_texts(options: TrainOptions, texts: Sequence[str]) -> np.ndarray:
    """float32[m, d] of the texts, from the cache where the same texts were encoded before."""
    info = describe_model(options.text_model)
    key = hashlib.sha256("\0".join((info.name, *texts)).encode("utf-8", "backslashreplace")).hexdigest()[:16]

    def make(path: Path) -> None:
        model = load_text_model(options.text_model, model_settings(options))
        chunks = [texts[start : start + _TEXTS_PER_CALL] for start in range(0, len(texts), _TEXTS_PER_CALL)]
        with ThreadPoolExecutor(options.num_threads or usable_cores()) as pool:
            encoded = tqdm(
                pool.map(model.encode_texts, chunks), total=len(chunks), desc="texts", disable=not sys.stderr.isatty()
            )
            np.save(path, np.concatenate(list(encoded)))

    return np.load(cached_file(f"texts-{key}.npy", make))


def _backbones(options: TrainOptions) -> tuple[Any, Any]:
    """The torch modules of the sides that are fine-tuned."""
    image = load_image_backbone(options.model) if "image" in options.finetune else None
    text = load_text_backbone(options.text_model) if "text" in options.finetune else None
    return image, text


def _finetuned(trained: Any) -> dict[str, torch.nn.Module]:
    names = ("image_backbone", "text_backbone")
    return {name: getattr(trained, name) for name in names if getattr(trained, name, None) is not None}


def _image_dims(data: CaptionedImages, backbone: Any) -> dict[str, int]:
    """Width of what the image side gives; 0 for what it does not."""
    if backbone is not None:
        return {"features": backbone.feature_dim, "grid": backbone.grid_dim, "embedding": backbone.embedding_dim}
    return {
        name: data.images[name].shape[-1] if name in data.images else 0 for name in ("features", "grid", "embedding")
    }


def _text_dim(data: CaptionedImages, backbone: Any) -> int:
    return data.texts["vectors"].shape[1] if backbone is None else backbone.text_dim


def _classifier(options: TrainOptions, data: CaptionedImages) -> ClassifyingBackbone | None:
    """The frozen model whose classes --pseudo_weight is about."""
    if not options.pseudo_weight:
        return None
    backbone: Any = None if "features" not in data.images else load_image_backbone(options.model)
    if backbone is None or not hasattr(backbone, "class_weights"):
        raise ValueError(
            f"--pseudo_weight {options.pseudo_weight} needs a frozen model with a classifier, which {options.model!r} is "
            "not; leave the flag out"
        )
    return backbone


def _pseudo_images(
    options: TrainOptions, data: CaptionedImages, classifier: ClassifyingBackbone | None
) -> PseudoImages | None:
    if classifier is None:
        return None
    return make_pseudo_images(
        data.images["features"], classifier, load_text_model(options.text_model, model_settings(options))
    )


def _writer(
    options: TrainOptions, data: CaptionedImages, backbone: Any, classifier: ClassifyingBackbone | None, device: str
) -> Any:
    """The language model that --writer and --language_model name."""
    if options.writer == "vision-encoder-decoder":
        from vlm_ops.models.language_model import load_vision_encoder_decoder

        return load_vision_encoder_decoder(options.model, options.language_model)
    dims = _image_dims(data, backbone)
    num_cells = data.images["grid"].shape[1] if backbone is None else _num_cells(backbone)
    if options.writer == "cross-attention":
        from vlm_ops.models.language_model import CrossAttentionConfig, CrossAttentionWriter, load_language_model

        assert options.language_model is not None
        shapes = CrossAttentionConfig(dims["features"], dims["grid"], dims["embedding"], num_cells)
        writer: Any = CrossAttentionWriter(shapes, *load_language_model(options.language_model))
    else:
        writer = _compact_writer(options, data, dims, num_cells, classifier.class_names if classifier else ())
    writer.standardise_by(features_at_the_start(data, backbone, device))
    return writer


def _started(options: TrainOptions, writer: Any) -> Any:
    """The writer, with the weights of --start."""
    if options.start is None:
        return writer
    weights = ModelDirectory(path_of(options.start)).weights("writer")
    try:
        writer.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"--start {options.start} holds a captioner of other shapes or words; train with the flags and the data that it "
            "was trained with"
        ) from error
    return writer


def _mix_with_start(options: TrainOptions, writer: Any) -> None:
    """Mixes the weights of --start into the trained ones: what both have learnt stays, what either learnt by heart fades
    (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022)."""
    if not options.start_share:
        return
    assert options.start is not None
    start = ModelDirectory(path_of(options.start)).weights("writer")
    with torch.no_grad():
        for name, values in writer.state_dict().items():  # which are the writer's own
            if values.is_floating_point():
                values.lerp_(start[name].to(values), options.start_share)


def _compact_writer(
    options: TrainOptions, data: CaptionedImages, dims: Mapping[str, int], num_cells: int, class_names: Sequence[str]
) -> Any:
    from vlm_ops.training.captioner import words_of

    words = words_of(data, options.min_word_count, class_names)
    if not words:
        raise ValueError(f"no word stands {options.min_word_count} times in the captions; lower --min_word_count")
    # A grid with more channels than the features, which are its mean, has those of colours behind them.
    shapes = DecoderConfig(
        dims["features"], dims["grid"], dims["embedding"], num_cells, words, width=options.hidden_dim,
        dropout=options.dropout, color_dim=max(0, dims["grid"] - dims["features"]),
    )  # fmt: skip
    writer = CaptionDecoder(shapes)
    if describe_model(options.model).encodes_text:
        writer.begin_with(load_text_model(options.model, model_settings(options)).encode_texts(words))
    return writer


def _num_cells(backbone: Any) -> int:
    size = backbone.preprocessing.size
    with torch.inference_mode():
        return backbone(torch.zeros(1, 3, size, size, dtype=torch.uint8))["grid"].shape[1]


def _dtype(name: str, device: str) -> str:
    """`auto`: bfloat16 where the processor computes in it, float32 elsewhere."""
    if name != "auto":
        return name
    if device != "cpu":
        return usual_dtype(device)
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bfloat16_units() else "float32"


def _has_bfloat16_units() -> bool:
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("train", sys.argv[1:]))
