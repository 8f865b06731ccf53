"""The compact writer through ONNX Runtime, which multiplies its small matrices twice as fast as torch on a CPU.

Two graphs: what is read of the images, once, and a step of the search, word by word. The search is the module's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlm_ops.models.backbones import make_forward
from vlm_ops.models.caption_decoder import CaptionDecoder, Past, Read
from vlm_ops.models.captioner import Hypothesis
from vlm_ops.models.settings import CPU


class DecoderEngine:
    """A `CaptionDecoder` for writing alone. Safe to call from several threads."""

    def __init__(self, decoder: CaptionDecoder, name: str) -> None:
        """`name`: the graphs are cached under it; it changes with the weights."""
        config = decoder.config
        self._decoder = decoder
        inputs = {
            "features": torch.rand(2, config.feature_dim),
            "grid": torch.rand(2, config.num_cells, config.grid_dim),
        }
        if config.embedding_dim:
            inputs["embedding"] = torch.rand(2, config.embedding_dim)
        self._names = tuple(inputs)
        width, heads, num_tokens = config.width // config.num_heads, config.num_heads, config.num_tokens
        layers = range(config.decoder_layers)
        states = [f"{kind}_{layer}" for layer in layers for kind in ("keys", "values")]
        self._state_names = (*states, *(f"past_{name}" for name in states))
        self._read = make_forward(
            f"{name}-keys",
            lambda: _Read(decoder),
            {key: values.numpy() for key, values in inputs.items()},
            {key: {0: "n"} for key in inputs},
            CPU,
            range(len(states) + bool(config.colors)),
        )
        past = (2, 3, heads, 4, width)
        shapes = {"keys": (2, heads, width, num_tokens), "values": (2, heads, num_tokens, width), "past": past}
        examples = {
            "words": torch.full((2, 3), 4),
            "position": torch.tensor([4]),
            **{name: torch.rand(shapes[name.partition("_")[0]]) for name in self._state_names},
        }
        self._step = make_forward(
            f"{name}-word-step",
            lambda: _Step(decoder),
            {key: values.numpy() for key, values in examples.items()},
            {"words": {0: "n", 1: "c"}, "position": {}}
            | {name: {0: "n"} for name in states}
            | {f"past_{name}": {0: "n", 1: "c", 3: "t"} for name in states},
            CPU,
            range(1 + len(states)),
        )

    def write(
        self, inputs: Mapping[str, torch.Tensor], num_beams: int, num_wanted: int | None = None
    ) -> list[list[Hypothesis]]:
        """As `CaptionDecoder.write`."""
        if not len(inputs["features"]):
            return []
        read = self._read({name: inputs[name].numpy() for name in self._names})
        return self._decoder.search(self._next_words, tuple(map(torch.from_numpy, read)), num_beams, num_wanted)

    def _next_words(
        self, read: Read, past: Past, words: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, Past]:
        """As `CaptionDecoder.step`."""
        # Behind the keys and values that were read there may be the colours.
        states = dict(zip(self._state_names, (*read[: len(past)], *past), strict=True))
        inputs = {"words": words, "position": position, **states}
        log_probs, *grown = map(torch.from_numpy, self._step({name: each.numpy() for name, each in inputs.items()}))
        # The colours' say touches a few words, and would cost the graph a pass over all.
        return self._decoder.with_colors(log_probs, read), tuple(grown)


class _Read(torch.nn.Module):
    """`CaptionDecoder.read` with tensors one by one, as an export wants them."""

    def __init__(self, decoder: CaptionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: torch.Tensor, grid: torch.Tensor, embedding: torch.Tensor | None = None) -> Any:
        given = {"features": features, "grid": grid, "embedding": embedding}
        return self.decoder.read({name: values for name, values in given.items() if values is not None})


class _Step(torch.nn.Module):
    """`CaptionDecoder.step_without_colors` as a forward pass."""

    def __init__(self, decoder: CaptionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, words: torch.Tensor, position: torch.Tensor, *states: torch.Tensor) -> Any:
        read, past = states[: len(states) // 2], states[len(states) // 2 :]
        log_probs, grown = self.decoder.step_without_colors(read, past, words, position)
        return log_probs, *grown
