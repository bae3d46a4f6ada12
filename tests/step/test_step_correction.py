"""Second-order corrections: against exact second derivatives and explicit solves, and at work in LM."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EVERYWHERE,
    Correcting,
    Uphill,
    fit,
    flat,
    linear_problem,
    mlp,
    pinn,
    rand,
    relative,
    snapshot,
    unchanged,
)

import pgdfast
from pgdfast.linear import Linearizer
from pgdfast.step import Chord, Geodesic, Point
from pgdfast.step.correction import ACCELERATIONS, chosen_acceleration

# torch.func.jvp of some versions loads scripted decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

X, Y = rand(14, 3, seed=1), rand(14, 2, seed=2)


def network():
    model = mlp(3, 6, 2)
    return list(model.parameters()), model


def second_derivative(model, e):
    """The exact second derivative of model(X) along e."""
    names, params = zip(*model.named_parameters(), strict=True)
    params = [p.detach() for p in params]
    parts = [part.view_as(p) for part, p in zip(e.split([p.numel() for p in params]), params, strict=True)]

    def outputs(*tensors):
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (X,))

    def slope(*tensors):
        return torch.func.jvp(outputs, tensors, tuple(parts))[1]

    return torch.func.jvp(slope, tuple(params), tuple(parts))[1].reshape(-1)


def correcting(closure, params, mu=0.1, rates=None, **options):
    lin = Linearizer(params)(closure)
    return Correcting(closure, params, lin, pgdfast.solve(lin, mu, **options), rates)


@pytest.mark.parametrize("form", ["residuals", "mean", "sum with penalty"])
def test_what_the_linear_model_misses_is_half_the_second_derivative(form):
    params, model = network()
    scale = {"residuals": 1.0, "mean": math.sqrt(2 / Y.numel()), "sum with penalty": 1.0}[form]
    closure = {
        "residuals": lambda: model(X) - Y,
        "mean": lambda: F.mse_loss(model(X), Y),
        "sum with penalty": lambda: 0.5 * (model(X) - Y).square().sum() + 0.05 * params[0].square().sum(),
    }[form]
    before = snapshot(params)
    step = correcting(closure, params)
    e = rand(sum(p.numel() for p in params), seed=7)
    exact = scale * second_derivative(model, e)
    errors = []
    for h in (1e-3, 1e-4):
        loss, missed = step.at(h * e), step.missed()
        errors.append(relative(2 * missed / h**2, exact))
        assert math.isfinite(loss) and unchanged(params, before)
    assert errors[1] < 1e-3 and 9 < errors[0] / errors[1] < 11   # of first order in h


@pytest.mark.parametrize("solver", ["dual", "primal", "eigh", "cg", "lsmr"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_corrections_solve_with_the_damped_matrix(solver, scaled, penalty, backend):
    params, model = network()
    squares = (lambda: 0.05 * params[0].square().sum()) if penalty else (lambda: 0.0)
    lin = Linearizer(params, backend)(lambda: 0.5 * (model(X) - Y).square().sum() + squares())
    D = 0.5 + rand(lin.num_parameters, seed=3).square() if scaled else torch.ones(lin.num_parameters, dtype=torch.float64)
    solution = pgdfast.solve(lin, 0.1, scale=D if scaled else None, solver=solver, cg=pgdfast.CG(500, 1e-13))
    J, u = lin.dense(), rand(lin.num_residuals, seed=9)
    A = J.T @ J + torch.diag(0.1 * D + (lin.penalty if penalty else 0.0))
    assert relative(solution.solve_with_same_factor(u), torch.linalg.solve(A, J.T @ u)) < 1e-9
    assert relative(solution.solve_with_same_factor(2 * u), 2 * solution.solve_with_same_factor(u)) < 1e-9


@pytest.mark.parametrize("order", [100, 300])
@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_corrections_in_float32(order, solver):
    """Whether the step was summed in float64, refined, or neither."""
    A = rand(order, order + 20, seed=1) if solver == "dual" else rand(order + 20, order, seed=1)
    params, closure = linear_problem(A, rand(len(A), seed=2), torch.float32)
    lin = pgdfast.linearize(closure, params)
    for mu in (1e2, 1e-1):
        solution = pgdfast.solve(lin, mu, solver=solver)
        u, J = rand(len(A), seed=9), A.float().double()
        exact = torch.linalg.solve(J.T @ J + mu * torch.eye(J.shape[1], dtype=torch.float64), J.T @ u)
        correction = solution.solve_with_same_factor(u.float())
        assert correction.dtype == torch.float32 and relative(correction, exact) < 1e-3


@pytest.mark.parametrize("rates", [[1.0] * 4, [0.3] * 4, [0.3, 0.7, 0.0, 1.0]])
def test_geodesic_takes_the_parabola(rates):
    params, model = network()
    closure = lambda: model(X) - Y  # noqa: E731
    step = correcting(closure, params, rates=rates)
    delta = step.delta
    e, loss = step.ended(Geodesic(h=1e-4, ratio=math.inf))
    J = step.lin.dense()
    A = J.T @ J + 0.1 * torch.eye(J.shape[1], dtype=torch.float64)
    half = torch.linalg.solve(A, J.T @ second_derivative(model, delta) / 2)
    half = step.parameters.scaled(0, half) / max(rates)   # a group whose lr is 0 stays where it is
    assert relative(e - delta, half) < 1e-3
    assert step.count == 2
    plain, _ = step.ended(Geodesic(ratio=0.0))
    assert torch.equal(plain, delta)
    step.parameters.go({0: Point(e, displacement=True)})
    assert loss == pytest.approx(0.5 * float((model(X) - Y).detach().square().sum()), rel=1e-14)


def test_chord_ends_where_the_damped_problem_is_solved():
    """Its fixed point has J^T r(theta - e) = mu e, J of theta."""
    params, model = network()
    closure = lambda: model(X) - Y  # noqa: E731
    step = correcting(closure, params, mu=5.0)
    e, loss = step.ended(Chord(rounds=60, factor=1.0))
    step.parameters.go({0: Point(e, displacement=True)})
    residual = (model(X) - Y).detach().reshape(-1)
    step.parameters.all_back()
    step.lin.parameters_unchanged()
    assert relative(step.lin.vjp(residual), 5.0 * e) < 1e-3
    assert loss < 0.5 * float(step.lin.residual.square().sum()) and step.count > 3


def test_no_correction_where_the_model_is_exact():
    A = rand(9, 6, seed=1)
    for name in ACCELERATIONS:
        params, closure = linear_problem(A, rand(9, seed=2))
        optimizer = pgdfast.LM(params, damping=0.1, acceleration=name)
        optimizer.step(closure)
        assert optimizer.report.correction < 1e-10 and optimizer.report.gain_ratio == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", ACCELERATIONS)
@pytest.mark.parametrize("problem", ["pinn", "mean", "marquardt", "groups"])
def test_backends_agree(name, problem):
    curves = []
    for backend in EVERYWHERE:
        params, closure = pinn() if problem == "pinn" else fit()
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}] if problem == "groups" else params
        options = {"scaling": "marquardt"} if problem == "marquardt" else {}
        optimizer = pgdfast.LM(groups, damping=0.1, acceleration=name, backend=backend, solver="dual", **options)
        curves.append([float(optimizer.step(closure)) for _ in range(6)])
        assert max(optimizer.report.correction, 0.0) < 1
    for curve in curves[:2]:
        assert torch.allclose(torch.tensor(curve), torch.tensor(curves[2]), rtol=1e-6, atol=0)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_acceleration_saves_steps(name):
    def steps(**options):
        params, closure = pinn()
        optimizer = pgdfast.LM(params, damping=1e-2, damping_rule="delayed", **options)
        for step in range(400):
            optimizer.step(closure)
            if optimizer.report.loss_after < 1e-5:
                return step + 1
        return 1000

    assert steps(acceleration=name) < 0.75 * steps()


@pytest.mark.parametrize("name", ACCELERATIONS)
@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_uphill_is_undone_bit_for_bit(name, rule, backend):
    for jump in (100.0, math.nan, math.inf):
        closure = Uphill(jump)
        optimizer = pgdfast.LM([closure.w], damping=1.0, damping_rule=rule, acceleration=name, backend=backend)
        optimizer.step(closure)
        assert torch.equal(closure.w, closure.start) and optimizer.report.status in ("rejected", "stalled")


@pytest.mark.parametrize("name", ACCELERATIONS)
@pytest.mark.parametrize("when", [1, 2, 3])
def test_exceptions_leave_the_parameters_as_before(name, when):
    params, closure = fit()
    calls, before = 0, snapshot(params)

    def failing():
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        return closure()

    optimizer = pgdfast.LM(params, acceleration=name)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert unchanged(params, before) and all(p.requires_grad for p in params)


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_constant_damping_takes_the_corrected_step(name):
    params, closure = fit()
    before = flat(params)
    optimizer = pgdfast.LM(params, damping=0.3, damping_rule="constant", acceleration=name, weight_decay=0.1)
    optimizer.step(closure)
    moved = before - flat(params)
    plain, closure = fit()
    pgdfast.LM(plain, damping=0.3, damping_rule="constant", weight_decay=0.1).step(closure)
    assert optimizer.report.status == "accepted" and optimizer.report.correction > 1e-6
    apart = relative(moved - 0.1 * before, before - flat(plain) - 0.1 * before)
    assert apart == pytest.approx(optimizer.report.correction, rel=1e-6)   # decay is as without


def test_cross_entropies_are_refused_and_nothing_is_changed():
    params, model = network()
    labels = Y.argmax(1)
    for backend in EVERYWHERE:
        for closure in (
            lambda: F.cross_entropy(model(X), labels),
            lambda: F.binary_cross_entropy_with_logits(model(X), Y.sigmoid()) + model(X).square().sum(),
        ):
            before = snapshot(params)
            with pytest.raises(ValueError, match="cross-entropy.*nothing was changed.*acceleration=None"):
                pgdfast.LM(params, acceleration="geodesic", backend=backend).step(closure)
            assert unchanged(params, before)


def test_another_number_of_residuals_at_a_trial():
    params, model = network()
    rows = iter([14, 13])
    before = snapshot(params)
    with pytest.raises(ValueError, match="28 residuals before the step and 26 at a trial point"):
        pgdfast.LM(params, acceleration="geodesic").step(lambda: model(X[: (n := next(rows))]) - Y[:n])
    assert unchanged(params, before)


def test_choice_of_a_correction():
    assert chosen_acceleration(None) is None and chosen_acceleration("geodesic") == Geodesic()
    assert chosen_acceleration("chord") == Chord()
    own = Chord(rounds=2)
    assert chosen_acceleration(own) is own
    with pytest.raises(ValueError, match="unknown acceleration 'newton'; use 'auto', None, 'geodesic', 'chord', or an object"):
        chosen_acceleration("newton")
    with pytest.raises(TypeError, match="has no correct"):
        chosen_acceleration(3)
    with pytest.raises(ValueError, match="line_search and acceleration both shape the step; use one"):
        pgdfast.LM(fit()[0], acceleration="geodesic", line_search="armijo")


def test_copies_accelerate_too():
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=1e-2, acceleration="chord")
    optimizer.step(closure)
    assert copy.deepcopy(optimizer)._options.acceleration == Chord()


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("name", ["chord", "geodesic"])
def test_steps_whose_solves_are_widened_are_corrected_after_their_trials(name, solver):
    torch.manual_seed(0)   # float32, of a condition that asks for float64 sums
    net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    x = torch.rand(600, 2)
    y = torch.sin(3 * x[:, :1] * x[:, 1:])
    optimizer = pgdfast.LM(net.parameters(), damping=1.0, damping_rule="delayed", acceleration=name, solver=solver)
    losses = [float(optimizer.step(lambda: 30 * (net(x) - y))) for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
