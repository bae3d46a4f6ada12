"""The factor that ranks make together: that of one process, the same bits on all, and steps with it."""

import pytest
import torch
from helpers import relative
from parts import factor_problems, step_problems

from pgdfast.kernels import native

ORDERS = (5, 256, 600, 1111)   # one panel and less, several with a last one that is narrower


@pytest.mark.parametrize("size", (2, 3, 4))
@pytest.mark.parametrize(("dtype", "bound"), ((torch.float64, 1e-12), (torch.float32, 1e-3)))
def test_the_factor_solves_as_that_of_one_process(pool, size, dtype, bound):
    everywhere = pool.run(size, factor_problems.solutions, ORDERS, dtype)
    for number, n in enumerate(ORDERS):
        H, added, b, positions = factor_problems.system(n, dtype)
        factor, trace = native.factor(H, added)
        dual, _ = native.factor(H, added, positions)
        for found in everywhere:
            x, y, told, held, kinds = found[number]
            assert relative(x, factor.solve(b)) < bound and relative(y, dual.solve(b)) < bound, n
            assert told == pytest.approx(trace, rel=1e-6) and kinds == (n, False, True)
            assert torch.equal(x, everywhere[0][number][0]) and torch.equal(y, everywhere[0][number][1])
            assert held < n * (n + 256) * dtype.itemsize / 1.5 + 8 * 256**2


def test_a_matrix_that_is_not_positive_definite_has_no_factor_on_any_rank(pool):
    assert pool.run(3, factor_problems.indefinite, 700, 600) == [True] * 3


@pytest.mark.parametrize("solver", ("primal", "dual"))
def test_steps_with_a_shared_factor_are_those_of_one_process(pool, solver):
    case = ("penalty", {"solver": solver})
    alone = step_problems.run(None, *case)
    everywhere = pool.run(2, factor_problems.steps, case)
    for parameters, loss, told, shared in everywhere:
        assert shared >= 20 and torch.equal(parameters, everywhere[0][0])
        assert relative(parameters, alone[0]) < 1e-10
        assert loss == pytest.approx(alone[1], rel=1e-9) and [t[0] for t in told] == [t[0] for t in alone[2]]
