"""The compact captioner: a small transformer that reads an image's feature map and writes a sentence.

An encoder layer over the cells of the grid and a few tokens for the whole picture, then decoder layers
with cross-attention (Vaswani et al., "Attention Is All You Need", 2017), word by word. Its vocabulary
is that of its training captions. What colour the picture is about is named ahead of the sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.models.captioner import Hypothesis
from vlm_ops.models.standardised import Standardised

_WORD = re.compile(r"[a-z0-9]+(?:['’-][a-z0-9]+)*(?:(?<=s)['’])?")
_PARTED = re.compile(r"\s+['’]s\b")
_MAX_GRID = 1e4  # an infinity of a half-precision cache has no logarithm
# How strongly long sentences are favoured: log-probabilities are divided by length to this power
# (Wu et al., "Google's Neural Machine Translation System", 2016).
_LENGTH_POWER = 0.8
# Share of the images that go on, up to which copying those is cheaper than carrying the others along.
_WORTH_COPYING = 0.8
# What colours are called; the captioner asks itself which of them, where its captions use some.
_COLOR_WORDS = frozenset({
    "beige", "black", "blue", "bronze", "brown", "charcoal", "copper", "cream", "gold", "golden", "gray", "green", "grey",
    "khaki", "lavender", "magenta", "maroon", "multicoloured", "mustard", "navy", "olive", "orange", "peach", "pink", "purple",
    "red", "rust", "silver", "tan", "teal", "turquoise", "violet", "white", "yellow",
})  # fmt: skip
# How much they count, beside the sentence so far, when a colour is chosen. A writer that has seen few things of a colour
# believes that it knows what colour each is.
_COLOR_WEIGHT = 3.5
# Letters that a word may have to be said twice: "a" and "red" may, "grass" and "beach" only by a writer that has lost its way.
_REPEATABLE_LETTERS = 3
_LEAST_SHARE = 1e-3  # of a colour; less is not told from none
_WORD_SIZE = 0.04  # standard deviation of a word's numbers at the start


class Vocabulary:
    """Words and their numbers. 0 pads, 1 begins, 2 ends, 3 is any unknown word."""

    PAD, BEGIN, END, UNKNOWN = range(4)
    SPECIAL = ("<pad>", "<begin>", "<end>", "<unknown>")

    def __init__(self, words: Iterable[str]) -> None:
        """`words`: those of the vocabulary, without the special ones."""
        self.words = (*self.SPECIAL, *words)
        self._ids = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, captions: Iterable[str], min_count: int) -> Vocabulary:
        """The words that stand at least `min_count` times in the captions, in alphabetical order."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        return cls(sorted(word for word, count in counts.items() if count >= min_count))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str) -> list[int]:
        return [self._ids.get(word, self.UNKNOWN) for word in split_words(caption)]

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to the end sign."""
        words = []
        for number in ids:
            if number == self.END:
                break
            words.append(self.words[number])
        return " ".join(words)


# Signs that no sentence holds. The search begins behind them, as behind words that may not be said twice.
_UNWRITTEN = (Vocabulary.PAD, Vocabulary.UNKNOWN, Vocabulary.BEGIN)


def split_words(caption: str) -> list[str]:
    """Lower-case words of a caption, without its punctuation; "man 's", as tokenizers leave it, is one word."""
    return _WORD.findall(_PARTED.sub("'s", caption.lower()))


# What was read of images: keys, transposed, float32[n, heads, width / heads, m], and values, float32[n, heads, m,
# width / heads], of each layer; and log-probabilities of the colours, float32[n, number of colours], where some are named.
Read = tuple[torch.Tensor, ...]
# Keys and values of the words so far, of each layer: float32[n, c, heads, t, width / heads] each.
Past = tuple[torch.Tensor, ...]
# (read, past, last words, position) -> (log-probabilities of the next word, past with the last words)
Step = Callable[[Read, Past, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Past]]


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes of the compact captioner.

    Attributes:
        feature_dim, grid_dim, embedding_dim: Of the base model's outputs; `embedding_dim` may be 0.
        num_cells: Of the grid.
        words: The vocabulary without its special signs.
        width: Of the transformer; `num_heads` divides it.
        max_words: Longest sentence.
        color_dim: The last so many numbers of a cell are of colours and textures, not of things. By them the colour words
            are weighed ahead of the sentence; where there are none, they are not.
    """

    feature_dim: int
    grid_dim: int
    embedding_dim: int
    num_cells: int
    words: Sequence[str] = field(repr=False)
    width: int = 256
    num_heads: int = 4
    encoder_layers: int = 1
    decoder_layers: int = 2
    dropout: float = 0.1
    max_words: int = 20
    color_dim: int = 0

    @property
    def colors(self) -> list[str]:
        """The colour words that are weighed."""
        return [word for word in self.words if word in _COLOR_WORDS] if self.color_dim else []

    @property
    def num_tokens(self) -> int:
        """What the decoder reads of an image: its cells, the features, and what else there is."""
        return self.num_cells + 1 + bool(self.embedding_dim) + bool(self.colors)


class CaptionDecoder(Standardised):
    """Inputs of n images: `features` float32[n, feature_dim], `grid` float[n, num_cells, grid_dim] and, where
    `embedding_dim` is not 0, `embedding` float32[n, embedding_dim]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.feature_dim)
        self.config = config
        self.vocabulary = Vocabulary(config.words)
        width = config.width
        self.from_grid = nn.Linear(config.grid_dim, width)
        self.cell_position = nn.Parameter(torch.randn(config.num_cells, width) * 0.02)
        self.from_features = nn.Linear(config.feature_dim, width)
        self.from_embedding = nn.Linear(config.embedding_dim, width) if config.embedding_dim else None
        self.color_namer = _ColorNamer(config) if config.colors else None
        self.from_colors = nn.Linear(len(config.colors), width) if config.colors else None
        color_ids = [self.vocabulary.encode(color)[0] for color in config.colors]
        self.color_ids: torch.Tensor
        self.register_buffer("color_ids", torch.tensor(color_ids, dtype=torch.long), persistent=False)
        self.repeating: torch.Tensor
        signs = [-torch.inf if number in _UNWRITTEN else 0.0 for number in range(len(Vocabulary.SPECIAL))]
        repeating = signs + [0.0 if len(word) <= _REPEATABLE_LETTERS else -torch.inf for word in config.words]
        self.register_buffer("repeating", torch.tensor(repeating), persistent=False)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.num_heads, 4 * width, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.encoder_layers)
        )
        self.memory_norm = nn.LayerNorm(width)
        self.embedding = nn.Embedding(len(self.vocabulary), width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(config.max_words + 1, width) * 0.02)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(len(self.vocabulary)))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def blocks(self) -> list[_Block]:
        """The decoder's layers."""
        return [cast(_Block, block) for block in self.layers]

    def begin_with(self, vectors: np.ndarray) -> None:
        """Starts the words from what a text model knows of them: their main directions.

        Args:
            vectors: float32[number of words without the special ones, d].
        """
        centred = torch.from_numpy(vectors - vectors.mean(0))
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        reduced = centred @ directions[: self.config.width].T
        own = self.embedding.weight[len(Vocabulary.SPECIAL) :, : reduced.shape[1]]
        with torch.no_grad():
            own.copy_(_WORD_SIZE * reduced / reduced.std())

    def memory(self, inputs: Mapping[str, torch.Tensor], named: torch.Tensor | None = None) -> torch.Tensor:
        """What the decoder reads of the images: float32[n, num_tokens, width].

        Args:
            named: Shares of the colours in the captions, float32[n, number of colours], where they are known; zeros where none
                is named.
        """
        cells = _shortened(inputs["grid"])
        tokens = [self.from_grid(cells) + self.cell_position]
        tokens.append(self.from_features(self.standardised(inputs["features"]))[:, None])
        if self.from_embedding is not None:
            scale = self.config.embedding_dim**0.5  # the embedding has norm 1; this gives each number size 1
            tokens.append(self.from_embedding(scale * inputs["embedding"])[:, None])
        if self.color_namer is not None and self.from_colors is not None:
            # Learnt through the sentences too, it would learn the photos by heart, as these are.
            shares = self.color_namer(cells, self.training).float().softmax(dim=-1).detach()
            if named is not None:
                shares = _hinted(shares, named)
            tokens.append(self.from_colors(shares.clamp(min=_LEAST_SHARE).log())[:, None])
        hidden = self.dropout(torch.cat(tokens, dim=1))
        for layer in self.encoder:
            hidden = layer(hidden)
        return self.memory_norm(hidden)

    def forward(self, inputs: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """Logits of each next word, float32[n, c, t, vocabulary], for the words so far int64[n, c, t] of c
        sentences an image."""
        return self._logits_of(self.memory(inputs), ids)

    def _logits_of(self, memory: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.embedding(ids) + self.position[: ids.shape[2]])
        for block in self.blocks:
            hidden, _ = block(hidden, block.read(memory), None)
        return self._logits(hidden)

    def loss(
        self, inputs: Mapping[str, torch.Tensor], captions: Sequence[Sequence[str]], label_smoothing: float
    ) -> torch.Tensor:
        """Mean cross-entropy of the captions' words; every image has as many captions."""
        ids = self.encode(captions)
        memory = self.memory(inputs, self._named(ids) if self.training else None)
        logits = self._logits_of(memory, ids[:, :, :-1])
        return F.cross_entropy(
            logits.flatten(0, 2), ids[:, :, 1:].flatten(), ignore_index=Vocabulary.PAD, label_smoothing=label_smoothing
        )

    def color_loss(
        self, inputs: Mapping[str, torch.Tensor], captions: Sequence[Sequence[str]], label_smoothing: float
    ) -> torch.Tensor | float:
        """Cross-entropy of the colours that the captions name, each by its share, over the images of which some are."""
        named = self._named(self.encode(captions))
        rows = named.sum(1) > 0
        if self.color_namer is None or not rows.any():
            return 0.0
        logits = self.color_namer(_shortened(inputs["grid"][rows]), self.training)
        return F.cross_entropy(logits, named[rows], label_smoothing=label_smoothing)

    def _named(self, ids: torch.Tensor) -> torch.Tensor:
        """float32[n, number of colours]: the colours in sentences int64[n, c, t], by the share that name each."""
        counts = (ids[..., None] == self.color_ids).any(2).float().sum(1)
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    def encode(self, captions: Sequence[Sequence[str]]) -> torch.Tensor:
        """int64[n, c, t] with begin and end, padded."""
        limit, v = self.config.max_words, self.vocabulary
        rows = [[[v.BEGIN, *v.encode(text)[:limit], v.END] for text in texts] for texts in captions]
        longest = max(len(row) for texts in rows for row in texts)
        padded = [[row + [v.PAD] * (longest - len(row)) for row in texts] for texts in rows]
        return torch.tensor(padded, device=self.bias.device)

    def read(self, inputs: Mapping[str, torch.Tensor]) -> Read:
        """Keys and values of the images. They are read at every word, and so lie as a step multiplies them."""
        memory = self.memory(inputs)
        pairs = [block.read(memory) for block in self.blocks]
        read = [each for keys, values in pairs for each in (keys.transpose(2, 3).contiguous(), values.contiguous())]
        return tuple(read) if self.color_namer is None else (*read, self._seen_colors(inputs["grid"]))

    def step(self, read: Read, past: Past, words: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, Past]:
        """The next word after each sentence's last one.

        Args:
            read: From `read`.
            past: Keys and values of the words before, of each layer.
            words: int64[n, c], the last words.
            position: int64[1], where they stand.

        Returns:
            Log-probabilities float32[n, c, vocabulary], and the past with these words.
        """
        log_probs, grown = self.step_without_colors(read, past, words, position)
        return self.with_colors(log_probs, read), grown

    def step_without_colors(
        self, read: Read, past: Past, words: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, Past]:
        """As `step`; colours have had no say of their own."""
        hidden = self.embedding(words)[:, :, None] + self.position[position]
        grown: Past = ()
        for number, block in enumerate(self.blocks):
            pair = slice(2 * number, 2 * number + 2)
            hidden, kept = block(hidden, read[pair], past[pair])
            grown += kept
        # As a matrix, whose product takes the bias along.
        logits = self._logits(hidden.flatten(0, 2)).unflatten(0, words.shape)
        return F.log_softmax(logits.float(), dim=-1), grown

    def _seen_colors(self, grid: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the colours, float32[n, number of colours]."""
        assert self.color_namer is not None
        return F.log_softmax(self.color_namer(_shortened(grid)).float(), dim=-1).detach()

    def with_colors(self, log_probs: torch.Tensor, read: Read) -> torch.Tensor:
        """Log-probabilities float32[n, c, vocabulary] of words, in place, after those of the colours have had their say about
        which colour is named, not about whether one is."""
        if self.color_namer is None:
            return log_probs
        ids = self.color_ids.expand(*log_probs.shape[:2], -1)
        own = log_probs.gather(2, ids)
        return log_probs.scatter_(2, ids, own + self._gained_by_colors(own, read[-1][:, None]))

    def _gained_by_colors(self, own: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """What that adds to the log-probabilities of the colour words, `own` [..., number of colours]."""
        weighed = own + _COLOR_WEIGHT * seen
        return weighed + own.logsumexp(-1, keepdim=True) - weighed.logsumexp(-1, keepdim=True) - own

    @torch.inference_mode()
    def write(
        self, inputs: Mapping[str, torch.Tensor], num_beams: int = 5, num_wanted: int | None = None
    ) -> list[list[Hypothesis]]:
        """See Writer."""
        return self.search(self.step, self.read(inputs), num_beams, num_wanted)

    def search(self, step: Step, read: Read, num_beams: int, num_wanted: int | None = None) -> list[list[Hypothesis]]:
        """Beam search over all images at once. A sentence that has ended stays in its beam, and competes by its score with
        those that go on. None says a longer word twice.

        Args:
            step: As `self.step`.
            read: From `read`.
            num_wanted: The search of an image is over when its so many best sentences have ended (None: when all have);
                those that have not are left out.
        """
        config, v, device = self.config, self.vocabulary, self.bias.device
        n = len(read[0])
        found: list[list[Hypothesis]] = [[] for _ in range(n)]
        if not n:
            return found
        rows = torch.arange(n)  # images that are carried along
        is_found = torch.zeros(n, dtype=torch.bool)  # of these, whose search is over
        past = self._no_past(n, 1)
        words = torch.tensor(_UNWRITTEN, device=device).expand(n, 1, -1)
        totals, lengths = torch.zeros(n, 1, device=device), torch.zeros(n, 1, device=device)
        for position in range(config.max_words + 1):
            log_probs, past = step(read, past, words[:, :, -1], torch.tensor([position], device=device))
            log_probs.scatter_add_(2, words, self.repeating[words])
            if position == config.max_words:  # no room for another word
                log_probs[:, :, v.END + 1 :] = -torch.inf
            beams, chosen, totals, lengths = _best(totals, lengths, log_probs, words[:, :, -1] == v.END, num_beams)
            words = torch.cat([_pick(words, beams), chosen[:, :, None]], dim=2)
            past = tuple(_pick(each, beams) for each in past)
            has_ended = (chosen == v.END) | (totals == -torch.inf)  # there may be fewer sentences than beams
            is_over = has_ended[:, :num_wanted].all(dim=1).cpu()
            # Others of the batch have no say in what is found of an image.
            new = is_over & ~is_found
            if new.any():
                scores = (totals / lengths**_LENGTH_POWER).masked_fill(~has_ended, -torch.inf)
                sentences = self._sentences(words[new, :, len(_UNWRITTEN) :], scores[new])
                for row, hypotheses in zip(rows[new].tolist(), sentences, strict=True):
                    found[row] = hypotheses
                is_found = is_found | new
            if is_found.all():
                break
            if (~is_found).float().mean() > _WORTH_COPYING:
                continue
            going_on = (~is_found).nonzero()[:, 0]  # by numbers, rows are copied as wholes
            rows, is_found = rows[going_on], is_found[going_on]
            going_on = going_on.to(device)
            read, past = (tuple(each.index_select(0, going_on) for each in kept) for kept in (read, past))
            words, totals, lengths = (each[going_on] for each in (words, totals, lengths))
        return found

    def _no_past(self, num_images: int, count: int) -> Past:
        config = self.config
        shape = (num_images, count, config.num_heads, 0, config.width // config.num_heads)
        return (torch.zeros(shape, device=self.bias.device),) * (2 * config.decoder_layers)

    def _sentences(self, ids: torch.Tensor, scores: torch.Tensor) -> list[list[Hypothesis]]:
        """Words int64[n, c, t] and scores float32[n, c], best first."""
        return [
            [
                Hypothesis(self.vocabulary.decode(row), score)
                for row, score in zip(rows, row_scores, strict=True)
                if score > -torch.inf
            ]
            for rows, row_scores in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def log_probs(self, inputs: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """float32[n, c]: log-probability of each sentence int64[n, c, t] with begin and end, padded."""
        logits, targets = self(inputs, ids[:, :, :-1]).float(), ids[:, :, 1:]
        totals = logits.logsumexp(dim=3, keepdim=True)
        log_probs = (logits.gather(3, targets[..., None]) - totals)[..., 0]
        if self.color_namer is not None:
            gained = self._gained_by_colors(
                logits[..., self.color_ids] - totals, self._seen_colors(inputs["grid"])[:, None, None]
            )
            log_probs = log_probs + (gained * (targets[..., None] == self.color_ids)).sum(3)
        return (log_probs * (targets != Vocabulary.PAD)).sum(2)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(hidden), self.embedding.weight, self.bias)


class _ColorNamer(nn.Module):
    """Which colour words suit the image. Attention over its cells finds the thing, whose colour is not its background's; but
    what is seen there is colours alone: who knows the thing too learns by heart which colour each had."""

    num_heads, key_width, value_width, hidden_width = 8, 64, 128, 256
    cell_dropout, dropout = 0.2, 0.4

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.color_dim = config.color_dim
        self.keys = nn.Linear(config.grid_dim, self.key_width)
        self.cell_position = nn.Parameter(torch.zeros(config.num_cells, self.key_width))
        self.attention = nn.Linear(self.key_width, self.num_heads)
        self.values = nn.Linear(config.color_dim, self.value_width)
        self.hidden = nn.Linear(self.num_heads * self.value_width, self.hidden_width)
        self.out = nn.Linear(self.hidden_width, len(config.colors))

    def forward(self, cells: torch.Tensor, learns: bool = False) -> torch.Tensor:
        """float32[n, num_cells, grid_dim] -> logits float32[n, number of colours]; with dropout where it learns."""
        cells = F.dropout(cells, self.cell_dropout, learns)
        weights = self.attention(F.gelu(self.keys(cells) + self.cell_position)).softmax(dim=1)
        seen = (weights.transpose(1, 2) @ F.gelu(self.values(cells[:, :, -self.color_dim :]))).flatten(1)
        hidden = F.gelu(self.hidden(F.dropout(seen, self.dropout, learns)))
        return self.out(F.dropout(hidden, self.dropout, learns))


class _Block(nn.Module):
    """A decoder layer. Several sentences of one image share its reading of the image."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def read(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of the memory: float32[n, heads, m, width / heads] each."""
        keys, values = self.key_value(memory).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(
        self, hidden: torch.Tensor, read: tuple[torch.Tensor, ...], past: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """hidden: float32[n, c, t, width]; with `past`, keys and values of earlier words, t is 1 and the keys of `read` are
        transposed."""
        n, c, t, width = hidden.shape
        q, k, v = self.qkv(self.norms[0](hidden)).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=3), torch.cat([past[1], v], dim=3)
        attended = F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), is_causal=past is None and t > 1
        )
        hidden = hidden + self.dropout(self.self_out(attended.transpose(1, 2).reshape(n, c, t, width)))
        q = self.query(self.norms[1](hidden)).reshape(n, c * t, self.num_heads, -1).transpose(1, 2)
        if past is None:
            attended = F.scaled_dot_product_attention(q, read[0], read[1])
        else:
            attended = (q @ read[0] / q.shape[-1] ** 0.5).softmax(dim=-1) @ read[1]
        hidden = hidden + self.dropout(self.cross_out(attended.transpose(1, 2).reshape(n, c, t, width)))
        return hidden + self.dropout(self.down(F.gelu(self.up(self.norms[2](hidden))))), (k, v)


def _hinted(shares: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
    """Shares of the colours that stand, more or less by chance, between what was seen and what the captions name: a
    captioner that is told the colours has no need to learn them by heart, and believes what it is told later."""
    hints = torch.rand(len(shares), 1, device=shares.device) * (named.sum(1, keepdim=True) > 0)
    return torch.lerp(shares, named, hints)


def _shortened(grid: torch.Tensor) -> torch.Tensor:
    """Feature maps have long tails; patch tokens of a transformer may be negative."""
    grid = grid.float()
    return grid.sign() * torch.log1p(grid.abs().clamp(max=_MAX_GRID))


def _best(
    totals: torch.Tensor, lengths: torch.Tensor, log_probs: torch.Tensor, ended: torch.Tensor, num_beams: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The beams to go on with: which beam they come from, their new word, total and length."""
    # All words make a beam as long, so that its likeliest words are its best.
    likeliest = log_probs.topk(min(num_beams, log_probs.shape[2]), dim=2)
    num_words = likeliest.indices.shape[2]
    # After the end comes the end, at no cost, and nothing else.
    after_end = torch.full((num_words,), -torch.inf, device=log_probs.device)
    after_end[0] = 0.0
    values = torch.where(ended[:, :, None], after_end, likeliest.values)
    indices = likeliest.indices.masked_fill(ended[:, :, None], Vocabulary.END)
    candidates = totals[:, :, None] + values
    grown = lengths + (~ended).float()
    ranked = (candidates / grown[:, :, None] ** _LENGTH_POWER).flatten(1)
    best = ranked.topk(min(num_beams, ranked.shape[1]), dim=1).indices
    beams = best // num_words
    chosen, totals = (each.flatten(1).gather(1, best) for each in (indices, candidates))
    return beams, chosen, totals, grown.gather(1, beams)


def _pick(values: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """Rows of dimension 1 of values [n, c, ...] by beams int64[n, b] -> [n, b, ...]."""
    starts = torch.arange(len(values), device=beams.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (starts + beams).flatten()).unflatten(0, beams.shape)
