"""When a run has converged, when it has stalled, and that it says neither where there is more to gain."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import NOISY_SINE, Uphill, linear_problem, mlp, networks_of, rand, spectrum, stack_of, through_a_file

import pgdfast
from pgdfast.step.convergence import Tolerances

X = torch.linspace(0.05, 4, 40, dtype=torch.float64)
CURVES = (
    lambda p, x: p[0] * torch.exp(-p[1] * x) + p[2],
    lambda p, x: p[0] / (1 + torch.exp(p[1] - p[2] * x)),
    lambda p, x: p[0] * torch.sin(p[1] * x + p[2]),
    lambda p, x: p[0] * x / (p[1] + x) + p[2] * x,
)


def random_fit(seed, dtype):
    """A fit of three parameters, residuals of any scale, with noise or without: the parameters, and closures over such."""
    curve, draw = CURVES[seed % len(CURVES)], torch.Generator().manual_seed(seed)
    true = 2.5 * torch.rand(3, generator=draw, dtype=torch.float64) + 0.5
    start = true * torch.exp(torch.randn(3, generator=draw, dtype=torch.float64))
    scale, noise = 10.0 ** (seed % 9 - 6), (0.0, 1e-3, 0.1)[seed // 4 % 3]
    y = curve(true, X) + noise * torch.randn(40, generator=draw, dtype=torch.float64)
    return start.to(dtype).requires_grad_(), lambda p: lambda: scale * (curve(p, X.to(p.dtype)) - y.to(p.dtype))


def stationarity(p, closure_of):
    """By autograd in float64: the residuals' largest cosine with a column of J, and ||r|| over ||J theta||'s columns."""
    q = p.detach().double().requires_grad_()
    closure = closure_of(q)
    J = torch.autograd.functional.jacobian(lambda x: closure_of(x)(), q)
    r = closure().detach()
    columns = J.norm(dim=0)
    cosine = (torch.where(columns > 0, (J.T @ r).abs() / columns, 0.0) / r.norm().clamp_min(1e-300)).max()
    return float(cosine), float(r.norm() / (columns * q.detach()).norm())


def run(optimizer, closure, steps=400):
    """The status of each step, until the run is finished."""
    seen = []
    while len(seen) < steps and not (seen and optimizer.report.finished):
        optimizer.step(closure)
        seen.append(optimizer.report.status)
    return seen


def is_stationary(p, closure_of):
    """To what rounding leaves: of the loss, 1e3 units, or of the residuals, which then are noise."""
    cosine, left = stationarity(p, closure_of)
    eps = torch.finfo(p.dtype).eps
    return cosine <= math.sqrt(2e3 * eps) or left <= 16 * eps


# --- never away from a stationary point ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["auto", "dual", "primal", "cg", "eigh"])
@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "sweep"])
def test_random_fits_end_at_stationary_points(rule, solver, dtype):
    finished = 0
    for seed in range(8):
        p, closure_of = random_fit(seed, dtype)
        optimizer = pgdfast.LM([p], damping_rule=rule, solver=solver)
        run(optimizer, closure_of(p), 150)
        if optimizer.report.finished:
            assert is_stationary(p, closure_of), (seed, str(optimizer.report))
            finished += optimizer.converged
    assert finished >= 6


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "sweep"])
def test_120_random_fits_do_not_stall(rule):
    stalled = []
    for seed in range(120):
        p, closure_of = random_fit(seed, torch.float64)
        optimizer = pgdfast.LM([p], damping_rule=rule)
        if run(optimizer, closure_of(p), 40)[-1] == "stalled" and not is_stationary(p, closure_of):
            stalled.append(seed)
    assert not stalled


TINY = {
    "decay in units of 1e-5": lambda p: lambda: 1e-5 * (torch.exp(-p[0] * X.to(p.dtype)) - torch.exp(-2 * X.to(p.dtype))),
    "decay in units of 1e-6": lambda p: lambda: 1e-6 * (
        p[0] * torch.exp(-p[1] * X.to(p.dtype)) - 3 * torch.exp(-2.5 * X.to(p.dtype))),
    "atan in units of 1e3": lambda p: lambda: 1e3 * torch.atan(p),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-2, 1e4, 1e12])
@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "sweep"])
@pytest.mark.parametrize(("name", "start", "end"), [
    ("decay in units of 1e-5", (1.0,), (2.0,)), ("decay in units of 1e-6", (1.0, 1.0), (3.0, 2.5)),
    ("atan in units of 1e3", (3.0,), (0.0,)),
])
def test_a_damping_far_above_the_curvature_is_not_convergence(name, start, end, rule, damping, dtype):
    p = torch.tensor(start, dtype=dtype, requires_grad=True)
    optimizer = pgdfast.LM([p], damping=damping, damping_rule=rule)
    seen = run(optimizer, TINY[name](p), 200)
    assert (p.detach() - torch.tensor(end, dtype=dtype)).abs().max() < 1e-5 and seen[-1] == "converged"
    assert "the residuals are zero to rounding" in optimizer.report.advice or "the loss is 0" in optimizer.report.advice


@pytest.mark.parametrize("options", [
    {"lr": 0.5}, {"momentum": 0.5}, {"line_search": "armijo"}, {"acceleration": "chord"}, {"scaling": "marquardt"},
    {"norm_constraint": 1e-2}, {"backend": "torch"}, {"backend": "reference"}, {"solver": "lsmr"}, {"damping_rule": "delayed"},
])
def test_mu_falls_whatever_shapes_the_step(options):
    p = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM([p], damping=1e8, **options)
    run(optimizer, TINY["decay in units of 1e-6"](p), 300)
    assert (p.detach() - torch.tensor([3.0, 2.5])).abs().max() < 1e-5 and optimizer.report.status != "stalled"


def test_different_learning_rates():
    """What is frozen is not asked to be stationary."""
    p, q = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    closure = lambda: 1e-6 * torch.cat([torch.exp(-p * X) - torch.exp(-2 * X), q - 3])  # noqa: E731
    optimizer = pgdfast.LM([{"params": [p], "lr": 0.7}, {"params": [q], "lr": 0.0}], damping=1e8)
    assert run(optimizer, closure, 200)[-1] == "converged" and q.item() == 1.0 and p.item() == pytest.approx(2.0, rel=1e-6)


def test_a_damping_that_may_not_fall_is_named():
    p = torch.tensor([1.0], requires_grad=True)
    optimizer = pgdfast.LM([p], damping_rule=pgdfast.GainRatio(smallest=1e-2))
    assert run(optimizer, TINY["decay in units of 1e-5"](p), 5) == ["rejected", "stalled"]
    assert "1e-02, is the least that its rule allows" in optimizer.report.advice


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "sweep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_batch_at_every_call_is_named_and_no_convergence(dtype, rule):
    named = 0
    for seed in range(3):
        model, draw = mlp(3, 8, 1, seed=seed, dtype=dtype), torch.Generator().manual_seed(seed)
        batches = (torch.randn(16, 4, generator=draw).to(dtype) for _ in itertools.count())

        def closure(model=model, batches=batches):
            batch = next(batches)
            return F.mse_loss(model(batch[:, :3]), batch[:, :1].sin() + 0.5 * batch[:, 3:])

        optimizer = pgdfast.LM(model.parameters(), damping=1e-2, damping_rule=rule)
        for _ in range(120):
            optimizer.step(closure)
            assert not optimizer.converged
            if "at the same parameters: it takes another batch" in optimizer.report.advice:
                assert optimizer.report.status == "stalled"
                named += 1
                break
    assert named >= 2


def test_an_iterator_that_runs_out_within_a_step_is_named():
    values = iter([1.0, 2.0])
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM([w], damping=1e20)
    optimizer.step(lambda: next(values) * w)
    assert optimizer.report.status == "stalled" and "0.5 and then nan at the same parameters" in optimizer.report.advice
    assert w.item() == 1.0


def test_the_pseudo_inverse_says_what_it_left_out():
    t = torch.linspace(0, 1e-3, 60, dtype=torch.float64)
    closure_of = lambda p: lambda: p[0] * torch.exp(-p[1] * t) + p[2] - torch.exp(-5e3 * t) - 0.1  # noqa: E731
    for options, status in (({"scaling": "identity"}, "stalled"), ({"damping_rule": "constant"}, "accepted")):
        p = torch.tensor([1.0, 4e3, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = pgdfast.LM([p], damping=0.0, **options)
        for _ in range(8):
            optimizer.step(closure_of(p))
        report = optimizer.report
        assert report.status == status and report.cut == 1 and abs(p[1].item() - 4e3) < 1
        assert "leaves out 1 of 3 directions (eigenvalues below rcond = 1e-08" in report.advice
    for options in ({"scaling": "identity", "rcond": 1e-13}, {"scaling": "marquardt"}, {}):   # as it advises, and by itself
        p = torch.tensor([1.0, 4e3, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = pgdfast.LM([p], damping=0.0, **options)
        assert run(optimizer, closure_of(p), 40)[-1] == "converged" and abs(p[1].item() - 5e3) < 1e-6


# --- which test was met, and what the report says -----------------------------------------------------------------------------


def noisy_decay(dtype=torch.float64):
    """A fit with residuals left over: the parameters, and closures over such."""
    p, y = torch.tensor([1.0, 1.0, 0.0], dtype=dtype, requires_grad=True), 3 * torch.exp(-1.5 * X) + 0.1 * rand(40)
    return p, lambda p: lambda: CURVES[0](p, X.to(dtype)) - y.to(dtype)


@pytest.mark.parametrize(("options", "words"), [
    ({}, "is at rounding level: converged for float64. Check the error on fresh points"),
    ({"ftol": 1e-6}, "converged by the loss test"), ({"xtol": 1e-4}, "converged by the step test"),
    ({"gtol": 1e-4}, "converged by the gradient test"),
])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_each_test_says_which_it_is(options, words, scale):
    """Relative and free of units: the same step at any scale of the residuals and of a parameter."""
    p, closure_of = noisy_decay()
    closure = closure_of(p)
    optimizer = pgdfast.LM([p], damping=1e-3 * scale**2, **options)
    assert optimizer.converged is False
    seen = run(optimizer, lambda: scale * closure(), 60)
    assert seen[-1] == "converged" and words in optimizer.report.advice and optimizer.converged is True
    assert str(optimizer.report).startswith("converged: loss") and words in str(optimizer.report)
    cosine, _ = stationarity(p, closure_of)
    bound = options.get("gtol") or math.sqrt(2 * options.get("ftol", 0.0)) or 1e-4 * bool(options.get("xtol")) or 1e-7
    assert cosine <= 10 * bound
    if options:   # earlier than by rounding, and further steps may be taken
        full = pgdfast.LM([noisy_decay()[0]], damping=1e-3 * scale**2)
        q = full.param_groups[0]["params"][0]
        assert len(seen) < len(run(full, lambda: scale * closure_of(q)(), 60))
        loss = optimizer.report.loss_after
        optimizer.step(lambda: scale * closure())
        assert optimizer.report.loss_after <= loss


def test_a_test_that_is_off_says_nothing():
    p, closure_of = noisy_decay()
    optimizer = pgdfast.LM([p], damping=1e-3, ftol=0, xtol=0, gtol=0)
    seen = run(optimizer, closure_of(p), 40)
    assert len(seen) == 40 and set(seen) <= {"accepted", "rejected"} and not optimizer.converged
    assert is_stationary(p, closure_of) and optimizer.report.next_damping < 1   # its damping is left alone


@pytest.mark.parametrize("options", [{"ftol": -1.0}, {"xtol": 1.0}, {"gtol": "small"}, {"ftol": math.nan}])
def test_tolerances_out_of_range(options):
    with pytest.raises(ValueError, match="pgdfast.LM: .tol is .*; it must be None"):
        pgdfast.LM([torch.ones(1, requires_grad=True)], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "sweep"])
def test_exact_fits(rule, dtype):
    model, x = mlp(1, 20, 20, 1, dtype=dtype), torch.linspace(-1, 1, 15, dtype=dtype)[:, None]
    optimizer = pgdfast.LM(model.parameters(), damping_rule=rule)
    run(optimizer, lambda: model(x) - torch.sin(4 * x), 400)
    assert optimizer.converged and optimizer.report.loss_after < (1e-9 if dtype == torch.float32 else 1e-26)
    assert "the residuals are zero to rounding: converged for" in optimizer.report.advice


def test_a_penalty_at_a_fit_is_no_exact_fit():
    """Residuals of zero, and parameters that the penalty still draws."""
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM([w], damping=1e6)
    assert run(optimizer, lambda: (w - 1).square().sum() + 0.01 * w.square().sum(), 60)[-1] == "converged"
    assert w.item() == pytest.approx(1 / 1.01, rel=1e-7)


@pytest.mark.parametrize("name", ["cross-entropy", "gaussian", "huber"])
def test_losses_that_are_no_sums_of_squares(name):
    """A loss may be negative, too."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    A, y = rand(40, 3), rand(40, seed=1)
    losses = {
        "cross-entropy": lambda: F.binary_cross_entropy_with_logits(A @ w, (y > 0).double()),
        "gaussian": lambda: 0.5 * (-w[2]).exp() * (A[:, :2] @ w[:2] - 0.01 * y).square().mean() + 0.5 * w[2],
        "huber": lambda: F.huber_loss(A @ w, y, delta=0.1),
    }
    optimizer = pgdfast.LM([w], damping=1e8)
    assert run(optimizer, losses[name], 200)[-1] == "converged"
    g, = torch.autograd.grad(losses[name](), w)
    assert g.abs().max() < 1e-7 and (name != "gaussian" or optimizer.report.loss < 0)


def test_the_constant_rule_converges_by_the_model_alone():
    p, closure_of = noisy_decay()
    optimizer = pgdfast.LM([p], damping=1e-3, damping_rule="constant")
    seen = run(optimizer, closure_of(p), 80)
    assert seen[-1] == "converged" and is_stationary(p, closure_of) and optimizer.report.next_damping == 1e-3
    p = torch.tensor([1.0], requires_grad=True)
    optimizer = pgdfast.LM([p], damping=1e4, damping_rule="constant")
    assert run(optimizer, TINY["decay in units of 1e-5"](p), 5) == ["accepted"] * 5


def test_members_converge_each_by_itself():
    networks, alone = stack_of(3), networks_of(3)
    x, y = NOISY_SINE
    target = y.expand(3, *y.shape).clone()
    with torch.no_grad():
        target[1] = networks(x)[1]   # an exact fit from the start
        known = alone[1](x)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=3, damping=1e-2)
    assert optimizer.converged == [False] * 3
    optimizer.step(lambda: ((networks(x) - target) ** 2).mean((1, 2)))
    single = pgdfast.LM(alone[1].parameters(), damping=1e-2)
    single.step(lambda: ((alone[1](x) - known) ** 2).mean())
    assert optimizer.converged == [False, True, False] and single.converged
    assert optimizer.report.finished == [False, True, False] and optimizer.report[1].advice == single.report.advice


def test_captured_steps_converge_by_the_loss_test():
    for options, words in (({}, "is at rounding level"), ({"ftol": 1e-6}, "converged by the loss test")):
        p, closure_of = noisy_decay()
        optimizer = pgdfast.LM([p], damping=1e-3, **options)
        step = pgdfast.CapturedStep(optimizer, closure_of(p))
        for _ in range(60):
            step.step()
            if optimizer.converged:
                break
        assert optimizer.report.finished and words in optimizer.report.advice and is_stationary(p, closure_of)
    p = torch.tensor([1.0], requires_grad=True)
    optimizer = pgdfast.LM([p], damping=1e4)
    step = pgdfast.CapturedStep(optimizer, TINY["decay in units of 1e-5"](p))
    for _ in range(60):
        step.step()
    assert abs(p.item() - 2) < 1e-5
    with pytest.raises(ValueError, match="xtol or gtol does not work in it"):
        pgdfast.CapturedStep(pgdfast.LM([p], gtol=1e-8), lambda: p)


def test_a_resumed_run_says_the_same():
    """That the last step was in vain decides how much of a promise the next one takes for rounding."""
    def fitted(restart):
        w, closure = linear_problem(spectrum(8, 4, 1e-3), rand(8))
        offset = lambda: torch.cat([torch.sin(closure()), torch.full((1,), 1e7, dtype=torch.float64)])  # noqa: E731
        optimizer, seen = pgdfast.LM(w, damping=1e-3), []
        for k in range(40):
            if k == restart:
                state, optimizer = through_a_file(optimizer.state_dict()), pgdfast.LM(w, damping=1e-3)
                optimizer.load_state_dict(state)
                assert optimizer.converged is False
            optimizer.step(offset)
            report = optimizer.report
            seen.append((report.status, report.attempts, report.next_damping, report.advice))
        return seen

    whole = fitted(None)
    assert whole[-1][0] == "converged"
    for restart in (5, whole.index(next(s for s in whole if s[0] != "accepted")) + 1):
        assert fitted(restart) == whole


def test_the_state_of_another_rule_is_refused():
    closure = Uphill()
    first = pgdfast.LM([closure.w], damping_rule="delayed")
    first.step(closure)
    for rule, name in (("gain-ratio", "GainRatio"), ("auto", "Auto")):
        with pytest.raises(ValueError, match=f"saved under damping_rule='delayed' or .*, and this LM has {name};"):
            pgdfast.LM([closure.w], damping_rule=rule).load_state_dict(first.state_dict())


def test_an_ordinary_step_measures_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr("pgdfast.step.stopping.measured", lambda *a: asked.append(a))
    p, closure_of = noisy_decay()
    optimizer = pgdfast.LM([p], damping=1e-3)
    for _ in range(4):
        optimizer.step(closure_of(p))
    assert optimizer.report.status == "accepted" and not asked
    assert not Tolerances().asked and Tolerances(ftol=1e-8).asked and not Tolerances(ftol=0).asked


def test_no_learning_rate_is_no_convergence():
    """A warm-up begins at 0."""
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = pgdfast.LM([p], lr=0.0)
    assert run(optimizer, lambda: p - 3, 1) == ["accepted"] and p.item() == 1.0
    assert "every learning rate is 0" in optimizer.report.advice and not optimizer.report.finished
    captured = pgdfast.LM([p], lr=0.0)
    pgdfast.CapturedStep(captured, lambda: p - 3).step()
    assert captured.report.status == "accepted" and "every learning rate is 0" in captured.report.advice
    optimizer.param_groups[0]["lr"] = 1.0
    assert run(optimizer, lambda: p - 3, 20)[-1] == "converged" and p.item() == pytest.approx(3.0)


def test_a_group_without_a_learning_rate_is_as_if_frozen():
    """The others solve for what they can reach alone: their steps count on no part that then stays."""
    ends = []
    for frozen in (False, True):
        model = mlp(1, 8, 1)
        x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
        params = list(model.parameters())
        for p in params[2:] if frozen else ():
            p.requires_grad_(False)
        still = [p.detach().clone() for p in params[2:]]
        optimizer = pgdfast.LM([{"params": params[:2]}, {"params": params[2:], "lr": 0.0 if not frozen else 1.0}])
        for _ in range(10):
            loss = optimizer.step(lambda model=model, x=x: F.mse_loss(model(x), torch.sin(4 * x)))
        assert all(map(torch.equal, params[2:], still)) and optimizer.report.parameters == 16
        ends.append(float(loss))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["dead", "underflow"])
def test_residuals_without_a_derivative_are_no_convergence(name, backend):
    p = torch.ones(2, requires_grad=True)
    closure = {"dead": lambda: torch.relu(p - 1e3) - 1, "underflow": lambda: 1e-25 * (p - 3)}[name]
    dtype = torch.float64 if backend == "reference" and name == "underflow" else torch.float32
    optimizer = pgdfast.LM([p], backend=backend)
    if dtype == torch.float64:   # where nothing underflows
        assert run(optimizer, closure, 30)[-1] == "converged" and p.tolist() == pytest.approx([3.0, 3.0], rel=1e-3)
        return
    assert run(optimizer, closure, 3)[-1] == "stalled" and p.tolist() == [1.0, 1.0]
    assert "every derivative of the residuals is 0" in optimizer.report.advice


def test_a_cross_entropy_of_zero_has_converged():
    """Its rounding is not relative to it: steps still promise something, and change nothing."""
    w = torch.tensor([[1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    x, y = torch.ones(4, 1, dtype=torch.float64), torch.ones(4, dtype=torch.long)
    optimizer = pgdfast.LM([w])
    assert run(optimizer, lambda: F.cross_entropy(x @ w, y), 100)[-1] == "converged" and optimizer.report.loss == 0
    assert optimizer.report.advice.startswith("the loss is 0")
