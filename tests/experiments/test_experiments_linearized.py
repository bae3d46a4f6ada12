"""On a linear model the rates behind `regression-1d` hold exactly, to rounding (arXiv 2601.03162).

With e the residual and lambda_i, q_i the eigenpairs of K = J J^T, a step of rate eta multiplies
q_i . e by 1 - eta lambda_i / (mu + lambda_i) for LM, by 1 - eta for Gauss-Newton, and by
1 - eta lambda_i / N for SGD on the mean.
"""

import pytest
import torch

from pgdfast_experiments.methods import parse
from pgdfast_experiments.spectral import KNOWN
from pgdfast_experiments.training import least_squares_closure

LR, STEPS = 0.1, 25


@pytest.mark.parametrize("name", ["gn", "lm-0.1", "lm-0.5", "sgd"])
def test_every_ntk_mode_decays_at_its_rate(name):
    generator = torch.Generator().manual_seed(0)
    points, width = 6, 9
    left, _ = torch.linalg.qr(torch.randn(points, points, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(width, points, dtype=torch.float64, generator=generator))
    lam = torch.logspace(1, -3, points, dtype=torch.float64)
    jacobian = left * lam.sqrt() @ right.T
    theta = torch.randn(width, 1, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randn(points, 1, dtype=torch.float64, generator=generator)

    def residual():
        return jacobian @ theta - target

    method = parse(name, KNOWN)
    optimizer = method.build([theta], LR)
    closure = least_squares_closure(optimizer, residual, method.second_order)
    start = left.T @ residual().detach()
    for _ in range(STEPS):
        optimizer.step(closure)
    end = left.T @ residual().detach()

    if not method.second_order:
        factor = 1 - LR * lam / points
    else:
        factor = 1 - LR * lam / (method.damping + lam)
    torch.testing.assert_close(end, factor[:, None] ** STEPS * start, rtol=1e-9, atol=1e-12)
