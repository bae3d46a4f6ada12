"""The scale of mu and of the parameters: a factor on the residuals changes nothing, and what "auto" scales."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    EVERYWHERE,
    NOISY_SINE,
    flat,
    losses_of,
    memory_of,
    mlp,
    networks_of,
    rand,
    stack_of,
    through_a_file,
)

import pgdfast
from pgdfast.step import gradient_curvature
from pgdfast.step.rules import START

ADAPTIVE = ("gain-ratio", "delayed", "sweep")
OPTIONS = [{"damping_rule": rule} for rule in ADAPTIVE] + [{"damping_rule": "delayed", "acceleration": "chord"}]


def network(factor, dtype=torch.float64, loss="residuals"):
    """Parameters and closure of a fit whose residuals carry a factor."""
    model = mlp(2, 8, 3, dtype=dtype)
    x, y = rand(30, 2, seed=1, dtype=dtype), rand(30, 3, seed=2, dtype=dtype)
    closures = {
        "residuals": lambda: factor * (model(x) - y),
        "mean": lambda: factor**2 * F.mse_loss(model(x), y),
        "cross-entropy": lambda: factor**2 * F.cross_entropy(model(x), y.argmax(1)),
        "penalty": lambda: factor**2 * (F.mse_loss(model(x), y) + sum(0.01 * (p**2).sum() for p in model.parameters())),
    }
    return list(model.parameters()), closures[loss]


def nearly_linear(factor):
    """Parameters and closure of a fit whose first steps are accepted at their first damping."""
    model = mlp(3, 4)
    x, y = rand(30, 3, seed=1), rand(30, 4, seed=2)
    return list(model.parameters()), lambda: factor * (model(x) + 0.1 * torch.sin(model(x)) - y)


def decay(factor, dtype=torch.float64):
    """Parameters of very different size, and the closure of their fit."""
    b = torch.tensor([3.0, 4e-4], dtype=dtype, requires_grad=True)
    x = torch.linspace(0, 1e4, 20, dtype=dtype)
    y = 2.0 * torch.exp(-2e-4 * x) + 0.1 * rand(20, dtype=dtype)
    return [b], lambda: factor * (b[0] * torch.exp(-b[1] * x) - y)


def path(problem, factor, steps=20, **options):
    """Parameters after every step, and mu of each."""
    params, closure = problem(factor)
    optimizer, points, mus = pgdfast.LM(params, **options), [], []
    for _ in range(steps):
        optimizer.step(closure)
        points.append(flat(params))
        mus.append(optimizer.report.damping)
    return torch.stack(points), mus, optimizer.report


@pytest.mark.parametrize("power", [-14, 14])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [network, decay])
def test_a_power_of_two_on_the_residuals_changes_no_bit(problem, backend, dtype, options, power):
    options = options | {"backend": backend}
    points, mus, report = path(lambda c: problem(c, dtype), 1.0, **options)
    scaled, scaled_mus, scaled_report = path(lambda c: problem(c, dtype), 2.0**power, **options)
    assert torch.equal(points, scaled) and report.scaling == scaled_report.scaling
    factor = 1.0 if report.scaling == "marquardt" else 4.0**power
    assert scaled_mus == [factor * mu for mu in mus] and report.status == scaled_report.status
    assert not torch.equal(points[0], points[1])


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loss", ["residuals", "mean", "cross-entropy", "penalty"])
def test_a_factor_on_the_loss_changes_what_rounding_changes(loss, options, factor):
    if loss == "cross-entropy" and "acceleration" in options:
        options = {"damping_rule": "delayed", "solver": "primal"}
    points, *_ = path(lambda c: network(c, loss=loss), 1.0, 6, **options)
    scaled, *_ = path(lambda c: network(c, loss=loss), factor, 6, **options)
    assert float((points - scaled).abs().max()) < 1e-7 * float(points.abs().max())


def test_a_given_mu_is_taken_as_it_is():
    for factor in (1.0, 1e3):
        for options in ({"damping": 1e-2}, {"damping_rule": "constant"}):
            assert path(nearly_linear, factor, 1, **options)[1] == [1e-2]
        params, closure = nearly_linear(factor)
        assert path(nearly_linear, factor, 1)[1] == [START * gradient_curvature(pgdfast.linearize(closure, params))]


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_members_find_mu_as_they_would_alone(backend):
    factors = torch.tensor([1.0, 2.0**-10, 2.0**10], dtype=torch.float64)
    stack, alone = stack_of(3), networks_of(3)
    together = losses_of(stack)
    optimizer = pgdfast.LM(stack.parameters(), ensemble=3, backend=backend)
    optimizer.step(lambda: factors * together())
    for b, model in enumerate(alone):
        one = pgdfast.LM(model.parameters(), backend=backend)
        one.step(lambda b=b, model=model: factors[b] * F.mse_loss(model(NOISY_SINE[0]), NOISY_SINE[1]))
        assert optimizer.report[b].damping == pytest.approx(one.report.damping, rel=1e-10)
        assert optimizer.report[b].next_damping == pytest.approx(one.report.next_damping, rel=1e-8)


@pytest.mark.parametrize("problem", [network, decay])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_resumed_runs_go_on_bit_for_bit(problem, taken):
    params, closure = problem(1e-3)
    optimizer = pgdfast.LM(params)
    for _ in range(taken):
        optimizer.step(closure)
    others, resumed_closure = problem(1e-3)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    resumed = pgdfast.LM(others)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for _ in range(5):
        optimizer.step(closure)
        resumed.step(resumed_closure)
        assert torch.equal(flat(params), flat(others)) and optimizer.report.damping == resumed.report.damping


def test_states_from_before_the_scale_was_kept_go_on():
    params, closure = network(1.0)
    optimizer = pgdfast.LM(params, damping=0.3)
    optimizer.step(closure)
    state = optimizer.state_dict()
    for name in ("curvature", "scaled"):
        del state["state"][0]["members"][0][name]
    optimizer.load_state_dict(state)
    optimizer.step(closure)
    assert memory_of(optimizer)["members"][0]["curvature"] > 0 and optimizer.report.scaling == "identity"


def test_a_start_without_a_gradient_leaves_the_scale_to_the_next_step():
    params, closure = nearly_linear(1e3)
    weight = torch.zeros((), dtype=torch.float64)
    optimizer = pgdfast.LM(params)
    optimizer.step(lambda: weight * closure())
    assert math.isnan(memory_of(optimizer)["members"][0]["damping"]) and optimizer.report.damping == START
    weight.fill_(1.0)
    expected = START * gradient_curvature(pgdfast.linearize(closure, params))
    optimizer.step(lambda: weight * closure())
    assert optimizer.report.damping == expected and optimizer.report.status == "accepted"


@pytest.mark.parametrize("steps", [1, 3])
def test_captured_steps_find_the_same_mu(steps):
    ends = []
    for captured in (False, True):
        params, closure = nearly_linear(1e-2)
        optimizer = pgdfast.LM(params, damping_rule="gain-ratio")
        step = pgdfast.CapturedStep(optimizer, closure).step if captured else lambda o=optimizer, c=closure: o.step(c)
        for _ in range(steps):
            step()
        kept = optimizer.state_dict()["state"][0]["members"][0]
        ends.append((flat(params), kept["damping"], kept["curvature"]))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-9) and ends[0][1:] == pytest.approx(ends[1][1:], rel=1e-6)


def test_captured_steps_leave_marquardt_alone():
    params, closure = decay(1.0)
    optimizer = pgdfast.LM(params)
    optimizer.step(closure)
    with pytest.raises(ValueError, match="this LM's ordinary steps have chosen it .* scaling='identity'"):
        pgdfast.CapturedStep(optimizer, closure).step()
    params, closure = decay(1.0)
    optimizer = pgdfast.LM(params)
    pgdfast.CapturedStep(optimizer, closure).step()
    optimizer.step(closure)
    assert optimizer.report.scaling == "identity"


def linear(diagonal, unreached=0):
    """Residuals whose J^T J has this diagonal, beside parameters that they do not reach."""
    w = torch.zeros(len(diagonal) + unreached, dtype=torch.float64, requires_grad=True)
    size = torch.tensor(diagonal, dtype=torch.float64).sqrt()
    return [w], lambda: size * w[: len(diagonal)] - 1.0


@pytest.mark.parametrize(("diagonal", "unreached", "options", "scaling"), [
    ([1.0, 1e6], 0, {}, "marquardt"),
    ([1.0, 1e6], 3, {}, "marquardt"),
    ([1.0, 0.9e6], 0, {}, "identity"),
    ([1.0], 3, {}, "identity"),
    ([1.0, *[1e7] * 31], 0, {}, "marquardt"),
    ([1.0, *[1e7] * 32], 0, {}, "identity"),
    ([1.0, 1e7], 0, {"damping_rule": "constant"}, "identity"),
    ([1.0, 1e7], 0, {"scaling": "identity"}, "identity"),
    ([1.0, 1.0], 0, {"scaling": "marquardt"}, "marquardt"),
    ([1.0, 1e7], 0, {"damping_rule": "sweep"}, "marquardt"),
])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_what_is_scaled(diagonal, unreached, options, scaling, backend):
    params, closure = linear(diagonal, unreached)
    optimizer = pgdfast.LM(params, backend=backend, **options)
    optimizer.step(closure)
    assert optimizer.report.scaling == scaling
    assert memory_of(optimizer)["members"][0]["scaled"] == (scaling == "marquardt")
    assert ("scale" in optimizer.state[params[0]]) == (scaling == "marquardt")


def test_members_are_scaled_each_as_alone():
    w = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    size = torch.tensor([[1.0, 2.0], [1.0, 1e4], [1e-4, 1.0]], dtype=torch.float64)
    optimizer = pgdfast.LM([w], ensemble=3)
    for _ in range(3):
        optimizer.step(lambda: size * torch.atan(w) - 0.1 * size)
    assert optimizer.report.scaling == ["identity", "marquardt", "marquardt"]
    for b in range(3):
        v = torch.ones(2, dtype=torch.float64, requires_grad=True)
        alone = pgdfast.LM([v])
        for _ in range(3):
            alone.step(lambda b=b, v=v: size[b] * torch.atan(v) - 0.1 * size[b])
        assert torch.allclose(w[b], v, rtol=1e-10, atol=0) and alone.report.scaling == optimizer.report.scaling[b]
