"""Damping rules at work: the sequence of mu, what is kept, undone, and told."""

import math

import pytest
import torch
from helpers import EVERYWHERE, RULES, Uphill, fit, flat, memory_of, rand, relative, snapshot, unchanged

import pgdfast
from pgdfast import reference

# --- damping rules --------------------------------------------------------------------------------


def test_constant_mu_and_schedules():
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=lambda step: 0.1 / (step + 1), damping_rule="constant")
    seen = []
    for _ in range(4):
        optimizer.step(closure)
        seen.append(optimizer.report.damping)
    assert seen == [0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None, "1"])
def test_schedule_that_returns_nonsense(bad):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=lambda step: bad, damping_rule="constant")
    before = snapshot(params)
    with pytest.raises(
        ValueError, match="damping at step 0 is .*; it must be finite and not negative"
    ):
        optimizer.step(closure)
    assert unchanged(params, before)


def test_gain_ratio_follows_nielsen():
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.5, damping_rule="gain-ratio")
    mu = 0.5
    for _ in range(10):
        optimizer.step(closure)
        report = optimizer.report
        if report.attempts > 1 or report.status != "accepted":
            break
        assert report.damping == mu
        mu *= max(1 / 3, 1 - (2 * min(report.gain_ratio, 1.0) - 1) ** 3)
        assert report.next_damping == pytest.approx(mu, rel=1e-14)
        mu = report.next_damping
    else:
        assert mu < 0.5


@pytest.mark.parametrize(
    "rule, factors", [("gain-ratio", [2, 4, 8, 16]), ("delayed", [2, 2, 2, 2])]
)
def test_rejections_raise_mu(rule, factors):
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, damping_rule=rule)
    optimizer.step(closure)
    report = optimizer.report
    assert report.status == "rejected" and torch.equal(closure.w, closure.start)
    assert closure.calls == 1 + report.trials == 1 + report.attempts
    growth = (
        [2.0**k for k in range(1, report.attempts)]
        if rule == "gain-ratio"
        else [2.0] * (report.attempts - 1)
    )
    assert report.damping == pytest.approx(math.prod(growth), rel=1e-12)
    # Ten times the first attempt's mu where promises came down to rounding, else on from where the attempts stood.
    assert report.next_damping == {"gain-ratio": 10.0, "delayed": 4096.0}[rule]
    assert "no trial lowered the loss" in report.advice and factors == [int(g) for g in growth[:4]]


def test_delayed_divides_by_five():
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=1.0, damping_rule="delayed")
    mu = 1.0
    for _ in range(6):
        optimizer.step(closure)
        report = optimizer.report
        assert report.damping == pytest.approx(mu * 2 ** (report.attempts - 1), rel=1e-14)
        mu = report.next_damping
        assert mu == pytest.approx(report.damping / 5, rel=1e-14)


def test_damping_zero_is_gauss_newton_by_the_pseudo_inverse():
    J, b = rand(5, 8, seed=1), rand(5, seed=2)
    w = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    pgdfast.LM([w], damping=0.0, damping_rule="constant").step(lambda: J @ w - b)
    assert relative(w, torch.linalg.pinv(J) @ b) < 1e-10
    rank2 = J[:, :2] @ rand(2, 8, seed=3)
    w.data.zero_()
    pgdfast.LM([w], damping=0, damping_rule="constant").step(lambda: rank2 @ w - b)
    assert relative(w, torch.linalg.pinv(rank2, rtol=1e-6) @ b) < 1e-9


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
def test_damping_zero_grows_out_of_zero_where_it_must(rule):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.0, damping_rule=rule)
    losses = [float(optimizer.step(closure)) for _ in range(6)]
    assert losses[-1] < losses[0] and math.isfinite(optimizer.report.next_damping)


class Fixed(pgdfast.DampingRule):
    """A user's own rule."""

    def accepted(self, mu, memory, rho):
        return mu / 3, memory

    def rejected(self, mu, memory, rho, curvature):
        return 7 * mu, memory


class Counted(Fixed):
    """A user's own rule that remembers a number."""

    def memory(self):
        return {"accepted": 0.0}

    def accepted(self, mu, memory, rho):
        return mu / 3, {"accepted": memory["accepted"] + 1}


class Half:
    """A user's own search."""

    def search(self, loss, slope):
        yield 0.5
        return 0.5


class Shortest:
    """A search that does not end where it last looked."""

    def search(self, loss, slope):
        seen = {}
        for t in (1.0, 0.5, 0.25):
            seen[t] = yield t
        return min(seen, key=seen.get)


def test_own_rule_and_own_search():
    params, closure = fit()
    before, delta = flat(params), reference.solve(reference.linearize(closure, params), 0.3).step
    optimizer = pgdfast.LM(params, damping=0.3, damping_rule=Fixed(), line_search=Half())
    optimizer.step(closure)
    assert relative(before - flat(params), 0.5 * delta) < 1e-9
    assert optimizer.report.next_damping == 0.3 / 3 and optimizer.report.line_search == 0.5


def test_what_a_rule_remembers_is_the_optimizers():
    """One rule object serves two runs, and its memory goes on from a state_dict."""
    rule, optimizers = Counted(), []
    for _ in range(2):
        params, closure = fit()
        optimizers.append((pgdfast.LM(params, damping=0.3, damping_rule=rule), closure))
    (first, closure), (second, other) = optimizers
    for _ in range(3):
        first.step(closure)
    second.step(other)
    assert memory_of(first)["members"][0]["rule"] == {"accepted": 3.0}
    assert memory_of(second)["members"][0]["rule"] == {"accepted": 1.0} and vars(rule) == {}
    second.load_state_dict(first.state_dict())
    second.step(other)
    assert memory_of(second)["members"][0]["rule"] == {"accepted": 4.0}


def test_a_search_may_end_where_it_looked_before():
    params, closure = fit()
    before, delta = flat(params), reference.solve(reference.linearize(closure, params), 0.3).step
    optimizer = pgdfast.LM(params, damping=0.3, line_search=Shortest())
    optimizer.step(closure)
    report = optimizer.report
    assert report.status == "accepted" and report.line_search == 1.0 and report.trials == 4
    assert relative(before - flat(params), delta) < 1e-9 and report.loss_after == closure().item()


# --- acceptance, undo, failure --------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("search", [None, "armijo"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_uphill_is_undone_bit_for_bit(rule, backend, search, decay):
    closure = Uphill()
    optimizer = pgdfast.LM(
        [closure.w],
        damping=1.0,
        damping_rule=rule,
        backend=backend,
        line_search=search,
        weight_decay=decay,
    )
    for _ in range(3):
        optimizer.step(closure)
        assert torch.equal(closure.w, closure.start)
        assert optimizer.report.status in ("rejected", "stalled")
        assert optimizer.report.loss_after == optimizer.report.loss


def test_armijo_without_descent_under_the_constant_rule():
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, damping_rule="constant", line_search="armijo")
    optimizer.step(closure)
    assert torch.equal(closure.w, closure.start)
    assert (optimizer.report.status, optimizer.report.trials, optimizer.report.attempts) == (
        "rejected",
        10,
        1,
    )
    assert optimizer.report.next_damping == 1.0


def test_armijo_halves_until_the_decrease_suffices():
    w = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    closure = lambda: torch.atan(w)  # noqa: E731  Gauss-Newton overshoots from here
    optimizer = pgdfast.LM([w], damping=1e-12, damping_rule="constant", line_search="armijo")
    delta = reference.solve(reference.linearize(closure, [w]), 1e-12).step.item()
    loss = float(optimizer.step(closure))
    t, slope = optimizer.report.line_search, math.atan(2.0) / 5 * delta
    assert 0 < t < 1 and t == 0.5 ** (optimizer.report.trials - 1)
    assert w.item() == pytest.approx(2.0 - t * delta, rel=1e-12)
    phi = lambda t: 0.5 * math.atan(2.0 - t * delta) ** 2  # noqa: E731
    assert phi(t) <= loss - 1e-4 * t * slope and phi(2 * t) > loss - 1e-4 * 2 * t * slope


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_not_a_number_at_the_start(rule, backend):
    params, closure = fit()
    params[1].data[0] = math.nan
    before = snapshot(params)
    with pytest.raises(ValueError, match="nan|not finite"):
        pgdfast.LM(params, damping_rule=rule, backend=backend).step(closure)
    assert all(
        torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0))
        for p, q in zip(params, before, strict=True)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("search", [None, "armijo"])
def test_not_a_number_at_a_trial_is_a_rejection(value, search):
    closure = Uphill(jump=value)
    optimizer = pgdfast.LM([closure.w], damping=1.0, line_search=search)
    optimizer.step(closure)
    assert torch.equal(closure.w, closure.start) and optimizer.report.status in (
        "rejected",
        "stalled",
    )


def test_not_a_number_far_out_is_stepped_back_from():
    w = torch.tensor([1e-3, 3.0], dtype=torch.float64, requires_grad=True)
    closure = lambda: torch.log(w)  # noqa: E731  the full step of the second leaves the domain
    optimizer = pgdfast.LM([w], damping=1e-9)
    losses = [float(optimizer.step(closure)) for _ in range(30)]
    assert relative(w, torch.ones(2)) < 1e-6 and losses[-1] < losses[0]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("search", [None, "armijo"])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_exceptions_reach_the_user_with_the_parameters_as_before(error, search, when):
    closure = Uphill()

    def failing():
        result = closure()
        if closure.calls == when:
            raise error("from the closure")
        return result

    optimizer = pgdfast.LM([closure.w], damping=1.0, line_search=search)
    with pytest.raises(error, match="from the closure"):
        optimizer.step(failing)
    assert torch.equal(closure.w, closure.start)
    closure.jump = 0.0
    optimizer.step(closure)
    assert optimizer.report.status == "accepted" and optimizer.report.damping == 1.0


@pytest.mark.parametrize("rule", RULES)
def test_steps_after_convergence_keep_mu_finite(rule):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=1e-3, damping_rule=rule)
    losses = [float(optimizer.step(closure)) for _ in range(200)]
    assert rule == "constant" or losses[-1] <= losses[100]
    assert math.isfinite(optimizer.report.next_damping)


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed"])
def test_recovers_after_a_step_where_nothing_descended(rule):
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, damping_rule=rule)
    optimizer.step(closure)
    closure.jump = 0.0
    losses = [float(optimizer.step(closure)) for _ in range(60)]
    assert losses[-1] < 1e-3 * losses[0]


def test_converged_at_the_minimum():
    """With the loss at 3/2, steps soon promise less than its rounding; then w is small, and mu no longer moves."""
    w = rand(4).requires_grad_()
    optimizer, seen = pgdfast.LM([w], damping=1e-3), []
    for _ in range(60):
        optimizer.step(lambda: torch.cat([w, torch.ones(3).double()]))
        seen.append(optimizer.report.status)
    assert w.norm() < 1e-7 and optimizer.report.loss_after == 1.5
    assert seen == ["accepted"] * seen.index("converged") + ["converged"] * (60 - seen.index("converged"))
    assert optimizer.converged and "the gradient is zero to rounding" in optimizer.report.advice
    assert "converged for float64. Check the error on fresh points" in optimizer.report.advice


def test_failed_factorization_raises_mu_and_says_so():
    J = torch.ones(3, 2)   # J^T J is exactly singular, and 1e-30 is lost in it
    for rule in RULES:
        w = torch.zeros(2, requires_grad=True)
        optimizer = pgdfast.LM([w], damping=1e-30, damping_rule=rule, solver="primal")
        optimizer.step(lambda w=w: J @ w - 1)
        report = optimizer.report
        assert report.attempts > 1 and report.damping > 1e-30
        if rule in ("gain-ratio", "sweep"):   # mu rises fast enough to get there within a step
            assert report.status == "accepted" and report.loss_after < 1e-6
            assert "the factorization failed" in report.advice
        else:
            assert report.status == "failed" and not w.any()
            assert "not positive definite" in report.advice and "raise the damping" in report.advice


# --- stalls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "steps"), [("gain-ratio", 3), ("delayed", 4)])
def test_rejections_in_a_row_down_to_rounding_are_a_stall(rule, steps):
    """Delayed raises mu by 4,096 a step: in three it has not come to where no step can descend."""
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, damping_rule=rule)
    seen = []
    for _ in range(steps):
        optimizer.step(closure)
        seen.append(optimizer.report.status)
    assert seen == ["rejected"] * (steps - 1) + ["stalled"] and optimizer.report.finished and not optimizer.converged
    assert f"{steps} steps in a row found no descent at any of 12 dampings; look for a closure" in optimizer.report.advice
    closure.jump = 0.0   # it goes on by itself where steps descend again
    optimizer.step(closure)
    assert optimizer.report.status == "accepted" and optimizer.report.advice == ""


def test_the_count_of_rejections_survives_a_restart():
    closure = Uphill()
    first = pgdfast.LM([closure.w], damping=1.0)
    for _ in range(2):
        first.step(closure)
    second = pgdfast.LM([closure.w], damping=1.0)
    second.load_state_dict(first.state_dict())
    second.step(closure)
    assert second.report.status == "stalled" and second.report.advice.startswith("3 steps in a row")


def uphill(dtype):
    """The closure Uphill with a parameter of this type."""
    closure = Uphill()
    closure.w = closure.w.detach().to(dtype).requires_grad_()
    closure.start = closure.w.detach().clone()
    return closure


@pytest.mark.parametrize(("dtype", "mu", "scale"), [
    (torch.float32, 1e36, 1e16), (torch.float64, 1e250, 1e122),   # so large a curvature that mu does not hide what is promised
    (torch.float64, 1e5, 1.0),                                    # the bound is that of a curvature of 1e-15
])
def test_mu_at_its_bound_is_a_stall(dtype, mu, scale):
    closure = uphill(dtype)
    optimizer = pgdfast.LM([closure.w], damping=mu, damping_rule="gain-ratio")
    if scale == 1.0:
        optimizer.step(lambda: torch.zeros(1, dtype=dtype) * closure.w)
        memory_of(optimizer)["members"][0].update(damping=mu, curvature=1e-15)
    optimizer.step(lambda: scale * closure())
    assert optimizer.report.status == "stalled" and optimizer.report.next_damping == pytest.approx(mu, rel=1e-14)
    assert f"the damping is at its bound, {mu:.0e}, where steps have no length left" in optimizer.report.advice
    assert "converged" not in optimizer.report.advice


@pytest.mark.parametrize("rule", ["auto", "gain-ratio", "delayed", "longest", "sweep"])
@pytest.mark.parametrize("damping", [None, 1e24, 1e36])
def test_mu_stays_where_float32_holds_it(damping, rule):
    """Rejections within one step raise it by 1e20."""
    closure = uphill(torch.float32)
    optimizer, seen = pgdfast.LM([closure.w], damping=damping, damping_rule=rule), []
    for _ in range(8):
        optimizer.step(lambda: 1e12 * closure())
        assert torch.equal(closure.w, closure.start) and optimizer.report.damping < 3e38
        seen.append(optimizer.report.status)
    assert seen[0] == "rejected" and seen[-1] == "stalled"
    if rule != "sweep":
        optimizer = pgdfast.LM([closure.w], damping=damping, damping_rule=rule)
        step = pgdfast.CapturedStep(optimizer, lambda: 1e12 * closure())
        for _ in range(8 * 12):
            step.step()
            assert optimizer.report.damping < 3e38 and optimizer.report.status in ("rejected", "stalled")


@pytest.mark.parametrize("dtype, way_on", [(torch.float32, "use float64"), (torch.float64, "converged for float64")])
def test_rejections_at_rounding_level_are_convergence(dtype, way_on):
    """Far from zero, the loss's rounding hides what is left to gain."""
    w = torch.tensor([1e-3], dtype=dtype, requires_grad=True)
    offset = 1e3 if dtype == torch.float32 else 1e7
    optimizer = pgdfast.LM([w], damping=1e-3)
    for _ in range(30):
        optimizer.step(lambda: torch.cat([torch.sin(w), torch.full((1,), offset, dtype=dtype)]))
        if optimizer.report.finished:
            break
    assert optimizer.converged and way_on in optimizer.report.advice


def test_a_stall_is_not_named_where_steps_are_not_tried():
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0, damping_rule="constant", line_search="armijo")
    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.report.status == "rejected"
