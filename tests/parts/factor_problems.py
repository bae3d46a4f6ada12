"""Systems that ranks factor together, and steps that do; each function of ranks gets its group first."""

import torch
from parts import step_problems
from parts.on_ranks import ranks_of

from pgdfast.kernels import native
from pgdfast.parts import cholesky, kernels


def system(n, dtype):
    """(H of native.normal_matrix, what is added to its diagonal, right-hand side, positions)."""
    random = torch.Generator().manual_seed(n)
    A = torch.randn(n, n + 8, generator=random, dtype=torch.float64)
    H = native.normal_matrix(n, dtype)
    H[:n, :n] = (A @ A.T / n).triu().to(dtype)
    added = 0.1 + torch.rand(n, generator=random, dtype=torch.float64)
    b = torch.randn(n, generator=random, dtype=torch.float64).to(dtype)
    return H, added, b, torch.randperm(n, generator=random).tolist()


def solutions(group, orders, dtype):
    """(solution, that in another order, trace, bytes, (order, kinds)) of each system, by a factor that is shared."""
    ranks, found = ranks_of(group), []
    for n in orders:
        H, added, b, positions = system(n, dtype)
        before = H.clone()
        factor, trace = cholesky.shared_factor(ranks, H, added)
        other, _ = cholesky.shared_factor(ranks, H, added, positions)
        assert torch.equal(H, before)
        found.append((factor.solve(b), other.solve(b), trace, factor.bytes, (factor.order, factor.is_dual, other.is_dual)))
    return found


def indefinite(group, n, where):
    """Whether there is no factor of a matrix with a negative number on its diagonal."""
    H, added, _, _ = system(n, torch.float64)
    H[where, where] = -1e3
    return cholesky.shared_factor(ranks_of(group), H, added)[0] is None


def steps(group, case):
    """`step_problems.run` with all factors shared, in narrow panels, and how many there were."""
    before, made = (cholesky._WIDTH, kernels.SHARED_FROM, kernels.shared_factor), []

    def counted(*arguments):
        made.append(arguments)
        return before[2](*arguments)

    cholesky._WIDTH, kernels.SHARED_FROM, kernels.shared_factor = 5, 0, counted
    try:
        return *step_problems.run(group, *case), len(made)
    finally:
        cholesky._WIDTH, kernels.SHARED_FROM, kernels.shared_factor = before
