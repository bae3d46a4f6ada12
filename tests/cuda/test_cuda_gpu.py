"""The built kernels on a GPU, where there is one: problems of the tasks against the reference, and the ensemble kernel."""

import pytest
import torch
from helpers import mlp, rand, reference, relative

import pgdfast
from pgdfast.kernels import cuda, cuda_library
from pgdfast.tasks import verification, verify

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
        assert type(lin.operator) is cuda.Kernels
        steps = [pgdfast.solve(lin, 0.1, solver=s).step for s in ("dual", "primal", "cg")]
        found.append([lin.gram(), lin.dense(), lin.gradient(), *steps])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_members_of_an_ensemble():
    model, x = mlp(2, 9, 1).cuda(), rand(19, 2).cuda()
    lin = pgdfast.linearize(lambda: model(x), model.parameters())
    kernels, rows = lin.operator, lin.rows
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
