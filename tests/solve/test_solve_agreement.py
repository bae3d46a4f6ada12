"""Every solver on every loss form against the reference's dense float64 solve."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, SOLVERS, TIGHT, condition, damping_of, mlp, rand, relative

import pgdfast
from pgdfast import reference


def data(samples, outputs, dtype=torch.float64):
    """Inputs, targets, positive weights, labels and soft targets."""
    x, y = rand(samples, 2, seed=1, dtype=dtype), rand(samples, outputs, seed=2, dtype=dtype)
    return x, y, y.abs() + 0.1, torch.arange(samples) % outputs, torch.softmax(y, 1)


FORMS = {  # a function of outputs z, parameters p, targets y, weights w, labels t, soft targets q
    "residuals": lambda z, p, y, w, t, q: z - y,
    "tuple": lambda z, p, y, w, t, q: (z - y, 0.5 * torch.sin(z[:, 0])),
    "mse": lambda z, p, y, w, t, q: F.mse_loss(z, y),
    "mse sum": lambda z, p, y, w, t, q: F.mse_loss(z, y, reduction="sum"),
    "sum of squares": lambda z, p, y, w, t, q: (z - y).pow(2).sum() / 7,
    "mean of squares": lambda z, p, y, w, t, q: (z - y).square().mean(),
    "weighted sum": lambda z, p, y, w, t, q: (
        3 * F.mse_loss(z, y) + 0.1 * (z[1:] - z[:-1]).square().sum()
    ),
    "elementwise weights": lambda z, p, y, w, t, q: (w * (z - y) ** 2).mean(),
    "penalty": lambda z, p, y, w, t, q: F.mse_loss(z, y) + 1e-2 * sum(v.square().sum() for v in p),
    "penalty on one": lambda z, p, y, w, t, q: F.mse_loss(z, y) + 0.1 * p[0].square().sum(),
    "bce": lambda z, p, y, w, t, q: F.binary_cross_entropy_with_logits(z, q),
    "bce pos_weight": lambda z, p, y, w, t, q: F.binary_cross_entropy_with_logits(
        z, q, pos_weight=w[0]
    ),
    "ce": lambda z, p, y, w, t, q: F.cross_entropy(z, t),
    "ce class weights": lambda z, p, y, w, t, q: F.cross_entropy(z, t, w[0]),
    "ce ignore_index": lambda z, p, y, w, t, q: F.cross_entropy(z, t, ignore_index=1),
    "ce smoothing": lambda z, p, y, w, t, q: F.cross_entropy(z, t, label_smoothing=0.1),
    "ce soft": lambda z, p, y, w, t, q: F.cross_entropy(z, q),
}
HIDDEN = {"one": (3,), "two": (4, 3), "three": (3, 4, 3)}
SIZES = [
    (form, outputs)
    for form in FORMS
    for outputs in (1, 10)
    if outputs > 1 or not form.startswith("ce")
]


def problem(form, hidden, outputs, many, dtype=torch.float64):
    """A tanh network with fewer or more residuals than parameters: its parameters and closure."""
    model = mlp(2, *HIDDEN[hidden], outputs, dtype=dtype)
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    samples = size // outputs + 3 if many else max(2, size // (3 * outputs))
    x, *rest = data(samples, outputs, dtype)
    return params, lambda: FORMS[form](model(x), params, *rest)


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("form, outputs", SIZES)
def test_step_agrees_with_the_reference(form, outputs, hidden, many):
    params, closure = problem(form, hidden, outputs, many)
    ref = reference.linearize(closure, params)
    mu = damping_of(ref)
    expected = reference.solve(ref, mu)
    for backend in BACKENDS if hidden == "one" else BACKENDS[:1]:
        lin = pgdfast.linearize(closure, params, backend=backend)
        for solver in SOLVERS:
            solution = pgdfast.solve(lin, mu, solver=solver, cg=TIGHT)
            assert solution.status == "solved" and solver in (solution.solver, "auto")
            assert relative(solution.step, expected.step) < 1e-9, (backend, solver)
            assert solution.predicted_reduction == pytest.approx(
                expected.predicted_reduction, rel=1e-9
            )
            assert solution.residual_norm < 1e-9


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("outputs", [1, 10])
@pytest.mark.parametrize("form", ["residuals", "mse", "penalty", "penalty on one", "bce"])
def test_scale_means_the_same_matrix_in_every_solver(form, outputs, many):
    params, closure = problem(form, "two", outputs, many)
    ref = reference.linearize(closure, params)
    scale = torch.logspace(-2, 2, ref.num_parameters, dtype=torch.float64)[
        torch.randperm(ref.num_parameters, generator=torch.Generator().manual_seed(0))
    ]
    mu = damping_of(ref, 1e3, scale)
    expected = reference.solve(ref, mu, scale=scale)
    A = mu * torch.diag(scale) + ref.dense().T @ ref.dense()
    assert relative(expected.step, torch.linalg.solve(A, ref.vjp(ref.residual))) < 1e-10
    for backend in BACKENDS:
        lin = pgdfast.linearize(closure, params, backend=backend)
        for solver in SOLVERS:
            solution = pgdfast.solve(lin, mu, scale=scale, solver=solver, cg=TIGHT)
            assert relative(solution.step, expected.step) < 1e-9, (backend, solver)
            assert solution.residual_norm < 1e-9
            assert solution.predicted_reduction == pytest.approx(
                expected.predicted_reduction, rel=1e-9
            )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("target", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize(
    "form, outputs", [("mse", 10), ("penalty", 1), ("bce", 1), ("ce", 10), ("tuple", 1)]
)
def test_float32_step(form, outputs, many, target, solver):
    params, closure = problem(form, "two", outputs, many, torch.float32)
    ref = reference.linearize(closure, params)
    mu = damping_of(ref, target)
    assert condition(ref, mu) <= 1.001e6
    solution = pgdfast.solve(
        pgdfast.linearize(closure, params), mu, solver=solver, cg=pgdfast.CG(2000, 1e-10)
    )
    assert solution.step.dtype == torch.float32
    assert relative(solution.step, reference.solve(ref, mu).step) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "form, outputs, many",
    [("residuals", 1, True), ("bce", 1, True), ("penalty", 1, False), ("ce", 10, False)],
)
def test_cg_does_not_diverge_where_its_tolerance_is_out_of_reach(form, outputs, many, backend):
    params, closure = problem(form, "two", outputs, many, torch.float32)
    ref = reference.linearize(closure, params)
    lin, mu = pgdfast.linearize(closure, params, backend=backend), damping_of(ref, 1e2)
    for tolerance in (1e-7, 3e-8, 1e-12):
        solution = pgdfast.solve(lin, mu, solver="cg", cg=pgdfast.CG(300, tolerance))
        assert relative(solution.step, reference.solve(ref, mu).step) < 1e-4
        assert solution.usable and solution.residual_norm < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["auto", "dual", "primal", "eigh"])
@pytest.mark.parametrize("outputs, many", [(1, False), (1, True), (10, False), (10, True)])
def test_no_damping_is_the_pseudo_inverse(outputs, many, solver, backend):
    params, closure = problem("residuals", "two", outputs, many)
    ref = reference.linearize(closure, params)
    solution = pgdfast.solve(
        pgdfast.linearize(closure, params, backend=backend), 0.0, solver=solver, rcond=1e-6
    )
    expected = torch.linalg.pinv(ref.dense(), rtol=1e-3) @ ref.residual
    assert solution.solver == "eigh" and solution.status == "solved"
    assert relative(solution.step, expected) < 1e-9
    assert relative(solution.step, reference.solve(ref, 0.0, rcond=1e-6).step) < 1e-9


@pytest.mark.parametrize("form", ["ce", "bce", "penalty", "weighted sum"])
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_no_damping_on_other_forms(form, many):
    params, closure = problem(form, "one", 10, many)
    ref = reference.linearize(closure, params)
    expected = reference.solve(ref, 0.0, rcond=1e-6).step
    solution = pgdfast.solve(pgdfast.linearize(closure, params), 0.0, rcond=1e-6)
    assert relative(solution.step, expected) < 1e-9


def test_no_damping_with_scale_is_the_shortest_scaled_step():
    params, closure = problem("residuals", "two", 1, False)
    ref = reference.linearize(closure, params)
    root = torch.logspace(-1, 1, ref.num_parameters, dtype=torch.float64)
    step = pgdfast.solve(
        pgdfast.linearize(closure, params), 0.0, scale=root.square(), rcond=1e-12
    ).step
    X = ref.dense() / root
    assert (
        relative(step, torch.linalg.lstsq(X, ref.residual, driver="gelsd").solution / root) < 1e-8
    )


def test_damping_that_goes_to_infinity_follows_the_gradient():
    params, closure = problem("mse", "two", 1, False)
    lin = pgdfast.linearize(closure, params)
    for solver in SOLVERS:
        step = pgdfast.solve(lin, 1e12, solver=solver, cg=TIGHT).step
        assert relative(step, lin.gradient() / 1e12) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_repeats_bit_for_bit(solver):
    params, closure = problem("mse", "two", 10, False)
    steps = [
        pgdfast.solve(pgdfast.linearize(closure, params), 0.1, solver=solver).step for _ in range(2)
    ]
    assert torch.equal(*steps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cg_reports_its_work(backend):
    params, closure = problem("mse", "two", 10, True)
    ref = reference.linearize(closure, params)
    lin, mu = pgdfast.linearize(closure, params, backend=backend), damping_of(ref)
    short = pgdfast.solve(lin, mu, solver="cg", cg=pgdfast.CG(3, 1e-12))
    assert short.status == "max_iterations" and short.iterations == 3 and short.usable
    assert "iteration limit" in short.advice and short.residual_norm > 1e-12
    long = pgdfast.solve(lin, mu, solver="cg", cg=pgdfast.CG(1000, 1e-8))
    assert long.status == "solved" and 3 < long.iterations < 200 and long.residual_norm <= 1e-8
    g, A = lin.gradient(), lin.ggn(long.step) + mu * long.step
    assert long.residual_norm == pytest.approx(float((g - A).norm() / g.norm()), rel=1e-3)
    expected = reference.solve(ref, mu, solver="cg", cg_max_iterations=3, cg_tolerance=1e-12)
    assert relative(short.step, expected.step) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_gradient_gives_a_zero_step(solver):
    w = rand(4).requires_grad_()
    lin = pgdfast.linearize(lambda: w - w.detach(), [w])
    solution = pgdfast.solve(lin, 0.1, solver=solver)
    assert (
        solution.status == "solved"
        and not solution.step.any()
        and solution.predicted_reduction == 0
    )


def test_auto_weighs_residuals_against_parameters():
    for many, expected in ((False, ("dual",)), (True, ("primal", "cg"))):
        params, closure = problem("residuals", "two", 1, many)
        lin = pgdfast.linearize(lambda: torch.cat([closure()] * (10 if many else 1)), params)  # noqa: B023
        solution = pgdfast.solve(lin, 0.1)
        assert solution.solver in expected
        assert f"M = {lin.num_residuals}, P = {lin.num_parameters}" in solution.reason


@pytest.mark.parametrize(
    "mu", [-1.0, float("nan"), float("inf"), None, "1", torch.tensor(1.0), torch.ones(2, 2)]
)
def test_bad_damping(mu):
    params, closure = problem("mse", "one", 1, False)
    with pytest.raises(ValueError, match=r"damping is (.|\n)* finite number that is not negative"):
        pgdfast.solve(pgdfast.linearize(closure, params), mu)


def test_bad_options():
    params, closure = problem("mse", "one", 1, False)
    lin = pgdfast.linearize(closure, params)
    with pytest.raises(
        ValueError, match="unknown solver 'qr'; use one of auto, dual, primal, cg, eigh, lsmr"
    ):
        pgdfast.solve(lin, 0.1, solver="qr")
    with pytest.raises(ValueError, match=r"scale has shape \(3,\); it must be \(13,\)"):
        pgdfast.solve(lin, 0.1, scale=torch.ones(3))
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="max_iterations is .* positive integer"):
            pgdfast.CG(max_iterations=bad)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance is .* positive number"):
            pgdfast.CG(tolerance=bad)
