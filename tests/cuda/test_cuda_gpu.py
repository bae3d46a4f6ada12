"""The built kernels on a GPU, where there is one: problems of the tasks against the reference, and the ensemble kernel."""

import pytest
import torch
from helpers import mlp, rand, reference, relative

import pgdfast
from pgdfast.kernels import cuda, cuda_library
from pgdfast_experiments import verification, verify

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_library.unusable() is not None, reason="there is no GPU with the CUDA kernels"
)


@pytest.mark.parametrize("name", ["regression-1d", "modular-mlp", "poisson-pinn", "transformer"])
def test_tasks(name):
    for _, make in verify._problems(name, "cuda"):
        for dtype in (torch.float64, torch.float32):
            assert not verification.compare(make, dtype, "native").violations()


def test_results_repeat_bit_for_bit():
    model, x = mlp(3, 40, 40, 2).cuda(), rand(300, 3).cuda()
    found = []
    for _ in range(3):
        lin = pgdfast.linearize(lambda: model(x), model.parameters())
        assert type(lin.kernels()) is cuda.Kernels
        steps = [pgdfast.solve(lin, 0.1, solver=s).step for s in ("dual", "primal", "cg")]
        found.append([lin.gram(), lin.dense(), lin.gradient(), *steps])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_members_of_an_ensemble():
    model, x = mlp(2, 9, 1).cuda(), rand(19, 2).cuda()
    lin = pgdfast.linearize(lambda: model(x), model.parameters())
    kernels, rows = lin.kernels(), lin.row_layout()
    assert rows is not None
    kernels.set_members(40, [0] * len(kernels.shifts), [0] * len(kernels.shifts))
    mu = torch.logspace(-2, 1, 40, dtype=torch.float64)
    ref = reference.linearize(lambda: model(x), model.parameters())
    for method in ("dual", "cg"):
        steps, found = kernels.members_solve(
            method, list(range(40)), lin.residual.expand(40, -1), mu, (), None, None, pgdfast.CG(2000, 1e-12)
        )
        for b in (0, 17, 39):
            assert relative(steps[b], reference.solve(ref, float(mu[b])).step) < 1e-8 and found[b][0] == "solved"


def captured_fit(solver, rule):
    model = mlp(1, 20, 20, 1).cuda()
    x = torch.linspace(-1, 1, 40, dtype=torch.float64, device="cuda")[:, None]
    lm = pgdfast.LM(model.parameters(), solver=solver, damping_rule=rule)
    return model, x, lm, lambda: torch.nn.functional.mse_loss(model(x), torch.sin(5 * x))


@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_captured_step_is_the_ordinary_one(solver, rule):
    """Replays included, from which the ordinary optimizer then goes on; new data in the same memory are read."""
    (model, x, lm, closure), (twin, x_twin, captured, same) = captured_fit(solver, rule), captured_fit(solver, rule)
    step = pgdfast.CapturedStep(captured, same)
    for k in range(15):
        if k == 10:
            for data in (x, x_twin):
                data.copy_(0.5 * data)
        lm.step(closure)
        for _ in range(lm.report.attempts if k < 13 else 1):
            step.step() if k < 13 else captured.step(same)
        assert captured.report.loss == pytest.approx(lm.report.loss, rel=1e-6)
    assert step._graph is not None
    flat = [torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (twin, model)]
    assert relative(*flat) < 1e-7


def test_a_closure_that_waits_is_refused_at_its_capture():
    model, _, lm, closure = captured_fit("dual", "constant")
    step = pgdfast.CapturedStep(lm, lambda: closure() * max(1.0, float(model[0].weight[0, 0])))
    for _ in range(3):
        step.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="cannot be captured"):
        step.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_captured_step_waits_for_nothing():
    _, _, lm, closure = captured_fit("dual", "gain-ratio")
    step = pgdfast.CapturedStep(lm, closure)
    for _ in range(5):
        step.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert lm.report.loss > 0
