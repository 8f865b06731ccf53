"""Features of any scale come out at one scale, also where the training images say little about it."""

from __future__ import annotations

import pytest
import torch

from vlm_ops.models.standardised import Standardised


def test_training_features_get_mean_0_and_standard_deviation_1() -> None:
    features = 5 + torch.tensor([0.5, 3, 400]) * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    module = Standardised(3)
    assert torch.equal(module.standardised(features), features)  # before it knows better
    module.standardise_by(features)
    standardised = module.standardised(features)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised.std(0), torch.ones(3), atol=3e-3, rtol=0)
    # By these names they stand in the weights of every trained model.
    assert set(module.state_dict()) == {"mean", "std"}


def test_a_feature_that_never_varies_stays_finite() -> None:
    module = Standardised(2)
    module.standardise_by(torch.tensor([[7.0, 1], [7, 2], [7, 3]]))
    assert module.standardised(torch.tensor([[7.0, 2], [7.5, 2]]))[:, 0].tolist() == pytest.approx([0, 500])


def test_a_single_training_image_gives_its_mean_alone() -> None:
    module = Standardised(2)
    module.standardise_by(torch.tensor([[7.0, -3]]))
    assert module.standardised(torch.tensor([[7.0, -3], [9, -4]])).tolist() == [[0, 0], [2, -1]]
