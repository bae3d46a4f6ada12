"""Captured steps over the CUDA kernels, emulated: what a graph would hold, run operation by operation."""

import pytest
import torch
import torch.nn.functional as F
from helpers import flat, gradient, mlp, rand, relative

import pgdfast

pytestmark = pytest.mark.usefixtures("on_cuda")


def problem(name, dtype):
    model, x = mlp(2, 9, 6, 1, dtype=dtype), rand(19, 2, dtype=dtype).requires_grad_(name == "pinn")
    if name == "pinn":
        return model, lambda: (gradient(model(x), x), model(x)[:3])
    if name == "penalty":
        return model, lambda: F.mse_loss(model(x), x[:, :1]) + 1e-2 * model[0].weight.square().sum()
    return model, lambda: F.mse_loss(model(x), x[:, :1].sin())


@pytest.mark.parametrize("name", ["regression", "penalty", "pinn"])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_emulated_kernels_take_the_same_steps(name, solver, dtype):
    model, closure = problem(name, dtype)
    lm = pgdfast.LM(model.parameters(), damping=0.1, damping_rule="gain-ratio", solver=solver)
    twin, same = problem(name, dtype)
    captured = pgdfast.LM(twin.parameters(), damping=0.1, damping_rule="gain-ratio", solver=solver)
    step = pgdfast.CapturedStep(captured, same)
    for _ in range(5):
        lm.step(closure)
        for _ in range(lm.report.attempts):
            step.step()
        assert captured.report.status == lm.report.status
    assert relative(flat(twin.parameters()), flat(model.parameters())) < (1e-10 if dtype == torch.float64 else 1e-4)
