"""Many small logistic regressions at once: every class against the rest, each with a few columns of its own.

scikit-learn takes several milliseconds for a fit of so few columns, nearly all of it outside the arithmetic, and a row
of a report needs two hundred fits. Here the classes of a fold are one batch of Newton's method. It ends at the minimum
that scikit-learn's ``LogisticRegression(C, class_weight="balanced")`` approaches, which is unique.

Shapes: C classes, M samples, K columns, and one more for the intercept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

_STEPS = 100  # half a dozen are enough as a rule
_CLOSE = 1e-8  # above the minimum, after which one more step ends at rounding
_LEAST_GAIN = 1e-4  # of what a full step promises (Armijo)


def predictions(train_CMK: np.ndarray, is_CM: np.ndarray, test_CMK: np.ndarray, penalty: float) -> np.ndarray:
    """Fit on standardised training columns and answer for the test ones: bool [C, M of the test].

    Args:
        train_CMK: a column that is constant there says nothing.
        is_CM: bool, the answers; both occur in every class.
        test_CMK: columns of the samples that are asked about.
        penalty: scikit-learn's C, the inverse strength of the penalty on the weights; the intercept is free.

    """
    x_CMK, asked_CMK = (torch.from_numpy(one).double() for one in (train_CMK, test_CMK))
    mean_C1K, spread_C1K = x_CMK.mean(1, keepdim=True), x_CMK.std(1, correction=0, keepdim=True)
    flat = spread_C1K <= 1e-12 * mean_C1K.abs()
    spread_C1K = torch.where(flat, torch.inf, spread_C1K)
    x_CMK, asked_CMK = ((one - mean_C1K) / spread_C1K for one in (x_CMK, asked_CMK))
    weights_CK = fit(_with_ones(x_CMK), torch.from_numpy(is_CM), penalty)
    return (_scores(_with_ones(asked_CMK), weights_CK) > 0).numpy()


def fit(x_CMK: Tensor, is_CM: Tensor, penalty: float) -> Tensor:
    """The weights [C, K] of the minimum; the last column of ``x_CMK`` is ones, and its weight is not penalised."""
    y_CM = is_CM.to(x_CMK)
    n = y_CM.shape[1]
    inside_C1 = y_CM.sum(1, keepdim=True)
    sample_CM = torch.where(is_CM, n / (2 * inside_C1), n / (2 * (n - inside_C1)))  # both sides weigh the same
    ridge_K = torch.full_like(x_CMK[0, 0], 1 / penalty)
    ridge_K[-1] = 0

    def losses(score_CM: Tensor, weights_CK: Tensor) -> Tensor:
        return (sample_CM * (softplus(score_CM) - y_CM * score_CM)).sum(1) + (ridge_K * weights_CK**2).sum(1) / 2

    weights_CK, score_CM = torch.zeros_like(x_CMK[:, 0]), torch.zeros_like(y_CM)
    for _ in range(_STEPS):
        p_CM = score_CM.sigmoid()
        gradient_CK = _scores(x_CMK.mT, sample_CM * (p_CM - y_CM)) + ridge_K * weights_CK
        curvature_CMK = (sample_CM * p_CM * (1 - p_CM))[..., None] * x_CMK
        hessian_CKK = x_CMK.mT @ curvature_CMK + ridge_K.diag()
        step_CK = torch.linalg.solve(hessian_CKK, gradient_CK)
        promised_C = (gradient_CK * step_CK).sum(1)
        change_CM, before_C = _scores(x_CMK, step_CK), losses(score_CM, weights_CK)
        length_C1 = torch.ones_like(inside_C1)
        while True:
            next_CK, next_CM = weights_CK - length_C1 * step_CK, score_CM - length_C1 * change_CM
            gained_C = before_C - losses(next_CM, next_CK)
            short_C = gained_C < _LEAST_GAIN * length_C1[:, 0] * promised_C - 1e-12 * before_C
            if not short_C.any():
                break
            length_C1[short_C] /= 2
        weights_CK, score_CM = next_CK, next_CM
        if float(promised_C.max()) < _CLOSE:
            break
    return weights_CK


def _with_ones(x_CMK: Tensor) -> Tensor:
    return pad(x_CMK, (0, 1), value=1.0)


def _scores(x_CMK: Tensor, weights_CK: Tensor) -> Tensor:
    return (x_CMK @ weights_CK[..., None]).squeeze(-1)
