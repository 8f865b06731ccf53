"""The compact writer through ONNX Runtime, which multiplies its small matrices twice as fast as torch on a CPU.

Two graphs: what is read of the images, once, and a step of the search, word by word. The search is the module's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlm_ops.models.backbones import make_forward
from vlm_ops.models.caption_decoder import CaptionDecoder, Read
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
        self._read_names = [f"{kind}_{layer}" for layer in layers for kind in ("keys", "values")]
        num_states = len(self._read_names)
        self._read_names += ["colors"] if config.colors else []
        self._read = make_forward(
            f"{name}-keys",
            lambda: _Read(decoder),
            {key: values.numpy() for key, values in inputs.items()},
            {key: {0: "n"} for key in inputs},
            CPU,
            range(len(self._read_names)),
        )
        shapes = {
            "keys": (2, heads, width, num_tokens),
            "values": (2, heads, num_tokens, width),
            "colors": (2, len(config.colors)),
        }
        examples = {
            "past": torch.rand(2, 3, num_states, heads, 4, width),
            "words": torch.full((2, 3), 4),
            "position": torch.tensor([4]),
            **{key: torch.rand(shapes[key.partition("_")[0]]) for key in self._read_names},
        }
        self._step = make_forward(
            f"{name}-word",
            lambda: _Step(decoder),
            {key: values.numpy() for key, values in examples.items()},
            {"past": {0: "n", 1: "c", 4: "t"}, "words": {0: "n", 1: "c"}, "position": {}}
            | {key: {0: "n"} for key in self._read_names},
            CPU,
            (0, 1),
        )

    def write(self, inputs: Mapping[str, torch.Tensor], num_beams: int) -> list[list[Hypothesis]]:
        """As `CaptionDecoder.write`."""
        if not len(inputs["features"]):
            return []
        read = self._read({name: inputs[name].numpy() for name in self._names})
        return self._decoder.search(self._next_words, tuple(map(torch.from_numpy, read)), num_beams)

    def _next_words(
        self, read: Read, past: torch.Tensor, words: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `CaptionDecoder.step`."""
        state = {"past": past, "words": words, "position": position, **dict(zip(self._read_names, read, strict=True))}
        log_probs, grown = self._step({name: each.numpy() for name, each in state.items()})
        return torch.from_numpy(log_probs), torch.from_numpy(grown)


class _Read(torch.nn.Module):
    """`CaptionDecoder.read` with tensors one by one, as an export wants them."""

    def __init__(self, decoder: CaptionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: torch.Tensor, grid: torch.Tensor, embedding: torch.Tensor | None = None) -> Any:
        given = {"features": features, "grid": grid, "embedding": embedding}
        return self.decoder.read({name: values for name, values in given.items() if values is not None})


class _Step(torch.nn.Module):
    """`CaptionDecoder.step` as a forward pass."""

    def __init__(self, decoder: CaptionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, past: torch.Tensor, words: torch.Tensor, position: torch.Tensor, *read: torch.Tensor) -> Any:
        return self.decoder.step(read, past, words, position)
