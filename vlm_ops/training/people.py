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
_MISSED = 0.1
_FEW = 10


def fit_people(data: CaptionedImages, validation: CaptionedImages) -> PeopleEvidence | None:
    """A logistic regression of "most captions name people" against "none does", on pooled features; None where
    the data have too few of either to learn from."""
    features, targets = _labelled(data)
    others, others_targets = _labelled(validation)
    shown = others[others_targets == 1]
    if min(int(targets.sum()), int((1 - targets).sum()), len(shown)) < _FEW:
        return None
    evidence = PeopleEvidence(features.shape[1])
    evidence.standardise_by(features)
    torch.nn.init.zeros_(evidence.linear.weight)
    torch.nn.init.zeros_(evidence.linear.bias)
    optimizer = torch.optim.LBFGS(evidence.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(evidence(features), targets)
        loss = loss + _WEIGHT_PENALTY * evidence.linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    with torch.no_grad():
        evidence.linear.bias.sub_(torch.quantile(evidence(shown), _MISSED))
    return evidence.eval()


def _labelled(data: CaptionedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, 1 where most captions name people, 0 where none does); other images are left out."""
    named = [names_people(sentence) for sentence in data.sentences]
    share = np.array([np.mean([named[row] for row in rows]) for rows in data.captions])
    clear = (share > 0.5) | (share == 0)
    return torch.from_numpy(data.images["features"][clear]), torch.from_numpy((share[clear] > 0.5).astype(np.float32))
