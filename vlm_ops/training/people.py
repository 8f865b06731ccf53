"""Learns from captions which pictures show people."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vlm_ops.mentions import names_people
from vlm_ops.models.people import PeopleEvidence
from vlm_ops.training.data import CaptionedImages

_WEIGHT_PENALTY = 0.02
# Of the validation images with people, how many may be described without them.
_MISSED = 0.04
_FEW = 10
_MOST = 0.5
_LEAST_STD = 1e-3


def fit_people(data: CaptionedImages, validation: CaptionedImages, log_probs: np.ndarray) -> PeopleEvidence | None:
    """A logistic regression of "most captions name people" against "none does", on pooled features; None where
    the data have too few of either to learn from.

    Args:
        log_probs: float32[n] of what the writer writes of the n validation images.
    """
    features, targets = _labelled(data)
    shows_people = _shares(validation) > _MOST
    if min(int(targets.sum()), int((1 - targets).sum()), int(shows_people.sum())) < _FEW:
        return None
    evidence = PeopleEvidence(features.shape[1])
    evidence.standardise_by(features)
    torch.nn.init.zeros_(evidence.linear.weight)
    torch.nn.init.zeros_(evidence.linear.bias)
    optimizer = torch.optim.LBFGS(evidence.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(evidence.of_images(features), targets)
        loss = loss + _WEIGHT_PENALTY * evidence.linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    sureness = torch.from_numpy(log_probs.astype(np.float32))
    evidence.sentence_mean.copy_(sureness.mean())
    evidence.sentence_std.copy_(sureness.std().clamp(min=_LEAST_STD))
    shown = torch.from_numpy(validation.images["features"][shows_people])
    with torch.no_grad():
        evidence.linear.bias.sub_(torch.quantile(evidence(shown, sureness[shows_people]), _MISSED))
    return evidence.eval()


def _labelled(data: CaptionedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, 1 where most captions name people, 0 where none does); other images are left out."""
    shares = _shares(data)
    clear = (shares > _MOST) | (shares == 0)
    return torch.from_numpy(data.images["features"][clear]), torch.from_numpy((shares[clear] > 0).astype(np.float32))


def _shares(data: CaptionedImages) -> np.ndarray:
    """float64[n]: the share of each image's captions that name people."""
    named = [names_people(sentence) for sentence in data.sentences]
    return np.array([np.mean([named[row] for row in rows]) for rows in data.captions])
