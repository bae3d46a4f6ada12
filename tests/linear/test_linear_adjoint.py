"""Products against autograd, once per structure: wrong rules and losses are noticed, right ones are not accused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, TIGHT, flat, gradient, mlp, perturb, rand, relative, snapshot, unchanged

import pgdfast
from pgdfast.linear import EnsembleLinearizer, Linearizer, linearization
from pgdfast.linear.adjoint import Flat, disagreement, tolerance_of
from pgdfast.tape import walk
from pgdfast.tape.losses.linear import READERS
from pgdfast.tape.rules import RULES
from pgdfast.tape.rules.table import Rule

X, Y = rand(9, 3, seed=1), rand(9, 4, seed=2)
ALARM = "the tape rules disagree with autograd's own gradient"


@pytest.fixture
def wrong(monkeypatch):
    """wrong(node, apply): a rule of one's own for a node."""
    monkeypatch.setattr(linearization, "_announced", set())

    def put(node, apply):
        rule = RULES[node]
        monkeypatch.setitem(RULES, node, Rule(apply, rule.saved, rule.read))
        monkeypatch.setattr(walk, "_RULE_OF_TYPE", {})

    return put


def false_tanh(op, y):
    op.scale(0, 1 - y * y * y)


def half_of_addmm(op, left, right, alpha, beta):
    if op.needs[1]:
        op.matmul(1, right=right)
    if op.needs[2]:
        op.matmul(2, left=left)   # and nothing for the bias


WRONG = {"TanhBackward0": (false_tanh, "Tanh"), "AddmmBackward0": (half_of_addmm, "Addmm")}
FORMS = {
    "residuals": lambda model: lambda: model(X) - Y,
    "two tensors": lambda model: lambda: (model(X) - Y, model(X)[:2]),
    "mse": lambda model: lambda: F.mse_loss(model(X), Y),
    "penalty": lambda model: lambda: F.mse_loss(model(X), Y) + 0.1 * model[0].weight.square().sum(),
    "cross-entropy": lambda model: lambda: F.cross_entropy(model(X), torch.arange(9) % 4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("node", WRONG)
def test_a_wrong_rule_is_left_for_autograd(node, form, backend, wrong):
    model = mlp(3, 5, 4)
    params, closure = list(model.parameters()), FORMS[form](model)
    right = [pgdfast.linearize(closure, params, backend=backend).dense()]
    perturb(params)
    right.append(pgdfast.linearize(closure, params, backend=backend).dense())
    perturb(params, size=-0.1)
    apply, name = WRONG[node]
    wrong(node, apply)
    linearizer = Linearizer(params, backend)
    with pytest.warns(UserWarning, match=f"{ALARM}.* at parameter .*{name}.* report the closure") as caught:
        lin = linearizer(closure)
    assert len(caught) == 1 and "no tape rule for one of its operations that agrees with autograd" in lin.sync_reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # said once
        for visit, J in enumerate(right):
            lin = linearizer(closure)
            assert relative(lin.dense(), J) < 1e-12 and relative(lin.jvp(v := rand(J.shape[1], seed=visit)), J @ v) < 1e-12
            perturb(params)


def test_suspects_are_the_operations_above_the_wrong_parameters_alone(wrong):
    wrong("TanhBackward0", false_tanh)
    model = mlp(3, 5, 4)
    with pytest.warns(UserWarning, match=ALARM) as caught:
        pgdfast.linearize(lambda: F.mse_loss(torch.sin(model(X)), Y), model.parameters())
    text = str(caught[0].message)
    assert "torch.tanh (TanhBackward0)" in text and "0 of shape (5, 3), 1 of shape (5,);" in text
    assert "sin" not in text and "mse" not in text


@pytest.mark.filterwarnings("ignore:pgdfast. (no tape rule|the tape rules disagree)")
def test_steps_beside_a_wrong_rule_are_those_of_autograd(wrong):
    ends = []
    for put in (False, True):
        if put:
            wrong("TanhBackward0", false_tanh)
        model = mlp(3, 5, 4)
        optimizer = pgdfast.LM(model.parameters())
        for k in range(4):
            optimizer.step(lambda k=k, model=model: F.mse_loss(model(X + 0.1 * k), Y))
        ends.append(flat(model.parameters()))
    assert relative(*ends) < 1e-9


@pytest.mark.filterwarnings("ignore:pgdfast. (no tape rule|the tape rules disagree)")
@pytest.mark.parametrize("form", [
    lambda nets: (nets(X) - Y).square().mean((1, 2)), lambda nets: nets(X) - Y, lambda nets: nets(X).transpose(1, 2) - Y.T,
])
def test_ensembles(form, wrong):
    nets = [mlp(3, 5, 4, seed=b) for b in range(3)]
    one = pgdfast.functional_ensemble(nets)
    params = list(one.parameters())
    closure = lambda: form(one)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = EnsembleLinearizer(params, 3)(closure).dense()
    wrong("TanhBackward0", false_tanh)
    lin = EnsembleLinearizer(params, 3)(closure)
    assert lin.kernels().name == "double-backward" and relative(lin.dense(), right) < 1e-12


def test_a_member_without_a_finite_loss_does_not_hide_the_others(wrong):
    one = pgdfast.functional_ensemble([mlp(3, 5, 4, seed=b) for b in range(3)])
    with torch.no_grad():
        next(iter(one.parameters()))[1] = torch.nan
    closure = lambda: (one(X) - Y).square().mean((1, 2))  # noqa: E731
    optimizer = pgdfast.LM(one.parameters(), ensemble=3)
    optimizer.step(closure)   # and accuses nobody
    assert optimizer.report.status == ["accepted", "failed", "accepted"]
    wrong("TanhBackward0", false_tanh)
    with pytest.warns(UserWarning, match=ALARM):
        pgdfast.LM(one.parameters(), ensemble=3).step(closure)


def test_captured_steps_refuse_a_wrong_rule(wrong):
    wrong("TanhBackward0", false_tanh)
    model = mlp(3, 5, 4)
    step = pgdfast.CapturedStep(pgdfast.LM(model.parameters()), lambda: F.mse_loss(model(X), Y))
    with pytest.warns(UserWarning, match=ALARM), pytest.raises(ValueError, match="no tape rule for one of its .* agrees with"):
        step.step()


def test_a_misread_loss_is_refused(monkeypatch):
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    monkeypatch.setitem(READERS, "MeanBackward0", READERS["SumBackward0"])
    before = snapshot(params)
    for _ in range(2):
        with pytest.raises(ValueError, match="loss was misread.* at parameter 0 of shape .*please report the closure"):
            pgdfast.LM(params).step(lambda: (model(X) - Y).square().mean())
        assert unchanged(params, before)


# --- the option -------------------------------------------------------------------------------------------------------------


def test_when_products_are_compared(monkeypatch):
    """A replay that mixes up its constants, as no structure can show."""
    model = mlp(3, 5, 4)
    closure = lambda: F.mse_loss(model(X), Y)  # noqa: E731

    def mixed(trace):
        return trace if trace is None else trace.constants.__setitem__(1, 2 * trace.constants[1]) or trace

    for check, noticed in (("first", False), ("never", False), ("every", True)):
        linearizer = Linearizer(model.parameters(), check=check)
        expected = linearizer(closure).dense()
        linearizer(closure)
        replay = linearizer.tracer._replay
        monkeypatch.setattr(linearizer.tracer, "_replay", lambda result, replay=replay: mixed(replay(result)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            J = linearizer(closure).dense()
        assert any(ALARM in str(w.message) for w in caught) == noticed and (relative(J, expected) < 1e-12) == noticed


def test_never_does_not_look(wrong):
    wrong("TanhBackward0", false_tanh)
    model = mlp(3, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgdfast.LM(model.parameters(), check="never").step(lambda: model(X) - Y)
        lin = pgdfast.linearize(lambda: model(X) - Y, model.parameters(), check="never")
    assert lin.kernels().name != "double-backward"


@pytest.mark.parametrize("make", [
    lambda check: pgdfast.LM([torch.ones(2, requires_grad=True)], check=check),
    lambda check: pgdfast.LM([torch.ones(2, requires_grad=True)], ensemble=2, check=check),
    lambda check: pgdfast.linearize(lambda: None, [torch.ones(2, requires_grad=True)], check=check),
])
@pytest.mark.parametrize("check", ["always", None, True, 3])
def test_unknown_checks_are_refused(make, check):
    with pytest.raises(ValueError, match=r"^pgdfast\.(LM|linearize): unknown check .*use 'first', 'every' or 'never'"):
        make(check)


def test_the_option_is_not_part_of_the_state():
    model = mlp(3, 5, 4)
    one, other = pgdfast.LM(model.parameters(), check="every"), pgdfast.LM(model.parameters(), check="never")
    one.step(lambda: model(X) - Y)
    other.load_state_dict(one.state_dict())
    assert other._tools.backend.check == "never" and other.state_dict().keys() == one.state_dict().keys()


def test_a_check_runs_the_closure_no_more_often():
    model, calls = mlp(3, 5, 4), []

    def closure():
        calls.append(0)
        return torch.dropout(model(X), 0.3, True) - Y

    for check in ("every", "never"):
        calls.clear()
        torch.manual_seed(0)
        optimizer = pgdfast.LM(model.parameters(), check=check, damping_rule="constant")
        for _ in range(3):
            optimizer.step(closure)
        assert len(calls) == 3


# --- no false alarms --------------------------------------------------------------------------------------------------------


def biharmonic(dtype):
    model, x = mlp(2, 12, 12, 1, dtype=dtype), rand(30, 2, seed=4, dtype=dtype).requires_grad_()

    def closure():
        u = model(x)
        for _ in range(2):
            u = sum(gradient(gradient(u, x)[:, d], x)[:, d] for d in range(2))
        return u - 1

    return model, closure


def cancelling(dtype):
    """Parameters that the loss does not depend on but for rounding: a shift before a mean is taken off, one logit."""
    model, x = mlp(3, 5, 4, dtype=dtype), X.to(dtype)
    return model, lambda: model(x) - model(x).mean(0) + 0 * model(x).sum()


def one_logit(dtype):
    model, x = mlp(3, 5, 1, dtype=dtype), X.to(dtype)
    return model, lambda: F.cross_entropy(model(x), torch.zeros(9, dtype=torch.int64))


def half(dtype):
    """float32 parameters, products in bfloat16."""
    model, x = mlp(3, 20, 4, dtype=torch.float32), X.float()

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float() - Y.float()

    return model, closure


def tiny(dtype):
    """Residuals and their derivatives of 1e-25."""
    model, x = mlp(3, 5, 4, dtype=dtype), X.to(dtype)
    return model, lambda: 1e-25 * (model(x) - Y.to(dtype))


def fitted(dtype):
    """At a minimum the gradient is rounding."""
    model, x = mlp(3, 5, 4, dtype=dtype), X.to(dtype)
    closure = lambda: F.mse_loss(model(x), Y.to(dtype))  # noqa: E731
    optimizer = pgdfast.LM(model.parameters(), acceleration="chord")
    for _ in range(60):
        optimizer.step(closure)
    return model, closure


def exact(dtype):
    model, x = mlp(3, 5, 4, dtype=dtype), X.to(dtype)
    y = model(x).detach()
    return model, lambda: F.mse_loss(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", [biharmonic, cancelling, one_logit, half, tiny, fitted, exact])
def test_no_false_alarms(problem, dtype):
    model, closure = problem(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "pgdfast: no tape rule")
        pgdfast.linearize(closure, model.parameters(), check="every")
        for k in (1e-6, 1e6):   # far from the size that networks have
            with torch.no_grad():
                model[0].weight.mul_(k)
            pgdfast.linearize(closure, model.parameters(), check="every")


NO_DATA = torch.arange(36).view(9, 4) % 5 == 0        # entries
NO_ROW = torch.arange(9)[:, None].expand(9, 4) == 4   # one row
HOLES = Y.masked_fill(NO_DATA, torch.nan)
NOT_FINITE = {   # of outputs z (9, 4): autograd's gradient is finite, or it is not, or only in places
    "nansum": lambda z: torch.nansum((z - HOLES) ** 2),
    "nanmean": lambda z: torch.nanmean((z - HOLES) ** 2),
    "nansum of residuals": lambda z: torch.nansum(z - HOLES, 1),
    "nan_to_num": lambda z: torch.nan_to_num(z - HOLES),
    "safe softmax": lambda z: torch._safe_softmax(z.masked_fill(NO_ROW, -torch.inf), 1) - 0.1,
    "where data are": lambda z: torch.where(NO_DATA, 0.0, z - HOLES),
    "where data are, squared": lambda z: torch.where(NO_DATA, 0.0, (z - HOLES) ** 2).mean(),
    "roots": lambda z: torch.where(z > 0, z.sqrt(), 0 * z),
    "arc cosines": lambda z: torch.where(z.abs() < 0.5, z.acos(), z),
    "norms": lambda z: (z * ~NO_ROW).norm(dim=1),
    "norms of masked": lambda z: (z.relu().square() * ~NO_ROW).sum(1).sqrt(),
}
SELECTED = {   # what is not finite stands behind what is not taken
    "softmax of nothing": lambda z: torch.softmax(z.masked_fill(NO_ROW, -torch.inf), 1).masked_fill(NO_ROW, 0.0),
    "softmax of nothing, where": lambda z: torch.where(NO_ROW, 0.0, torch.softmax(z.masked_fill(NO_ROW, -torch.inf), 1)),
    "logsumexp of nothing": lambda z: torch.logsumexp(z.masked_fill(NO_ROW, -torch.inf), 1).nan_to_num(0.0, 0.0, 0.0),
    "safe quotients": lambda z: torch.where(NO_DATA, 0.0, torch.where(NO_DATA, 1.0, z) ** 2 / ~NO_DATA),
    "root of what is clamped": lambda z: z.clamp_min(0).sqrt(),
    "norm of rectified": lambda z: (z - 9.0 * NO_ROW).relu().square().sum(1).sqrt(),
    "filled": lambda z: (z.masked_fill(NO_DATA, torch.nan) ** 2).masked_fill(NO_DATA, 0.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nested", [0, 1])
@pytest.mark.parametrize("name", [*NOT_FINITE, *SELECTED])
def test_what_is_not_finite(name, nested, backend):
    """No rule is accused, and where autograd is finite so are the products, and right."""
    model, x = mlp(3, 5, 4), X.clone().requires_grad_()
    params, form = list(model.parameters()), (NOT_FINITE | SELECTED)[name]

    def closure():
        z = form(model(x))
        return gradient(z.sin(), x) if nested else z

    linearizer = Linearizer(params, backend)
    for visit in range(3):
        result = closure()
        if not bool(result.isfinite().all()):
            assert nested and name not in SELECTED
            return
        u = rand(*result.shape, seed=visit) if result.dim() else torch.ones_like(result)
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(result, params, u)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lin = linearizer(closure)
        found = lin.vjp(u.reshape(-1)) if result.dim() else lin.gradient()
        finite = expected.isfinite()
        if not bool(finite.all()):
            assert name not in SELECTED
            finite &= found.isfinite()   # a product with 0 drops no NaN
        assert lin.kernels().name != "double-backward" and relative(found[finite], expected[finite]) < 1e-12
        if name in SELECTED:
            v = rand(len(expected), seed=visit)
            assert abs(lin.jvp(v) @ u.reshape(-1) - v @ expected) < 1e-10
        perturb(params, seed=visit)


def test_a_step_that_fails_for_what_is_not_finite_is_looked_at_the_next_time():
    """A row that is rectified away only later: its norm has no derivative, which the rectifier does not take."""
    model = mlp(3, 5, 4)
    optimizer, status = pgdfast.LM(model.parameters()), []
    for k in range(4):
        shift = 3 - 13.0 * NO_ROW if k else 3.0
        optimizer.step(lambda shift=shift: (model(X) + shift).relu().square().sum(1).sqrt() - 1)
        status.append(optimizer.report.status)
    assert status == ["accepted", "failed", "accepted", "accepted"]
    step = pgdfast.CapturedStep(pgdfast.LM(model.parameters()), lambda: SELECTED["norm of rectified"](model(X)))
    with pytest.raises(ValueError, match="no finite derivative where a later one does not take its result"):
        step.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_rule_is_seen_beside_what_is_not_finite(backend, wrong):
    """Element by element: autograd has no gradient of the first layer here, and one of the bias behind it."""
    wrong("TanhBackward0", false_tanh)
    model, ends = mlp(3, 5, 4), torch.arange(4) == 3
    for form in (lambda z: NOT_FINITE["roots"](z[:, :1]), SELECTED["softmax of nothing"]):
        closure = lambda form=form: torch.cat([form(model(X)), model(X).tanh() * ends], 1)  # noqa: E731
        with pytest.warns(UserWarning, match=ALARM):
            pgdfast.linearize(closure, model.parameters(), backend=backend)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_in_less_than_float32_are_allowed_for(precision, monkeypatch):
    model = mlp(3, 5, 4, dtype=torch.float32)
    trace = Linearizer(model.parameters()).tracer.trace(model(X.float()))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert {"highest": 4e-3, "high": 0.09, "medium": 0.19}[precision] < tolerance_of(trace) < 0.2


def test_a_small_part_that_is_wrong_is_seen_beside_a_large_one():
    """Parameters are compared one by one."""
    small, large = rand(3).requires_grad_(), rand(3, seed=1).requires_grad_()
    closure = lambda: torch.cat([1e-3 * small.tanh(), 1e3 * large.sin()])  # noqa: E731
    linearizer = Linearizer([small, large])
    lin, result = linearizer(closure), closure()
    trace = linearizer.tracer.trace(result)
    halved = Flat(lin.jvp, lambda u: lin.vjp(u) * torch.tensor([0.5] * 3 + [1.0] * 3, dtype=u.dtype))
    assert disagreement(halved, trace, [small, large], result).parameters == [0]
    assert disagreement(Flat(lin.jvp, lin.vjp), trace, [small, large], result) is None
    turned = Flat(lambda v: -lin.jvp(v), lin.vjp)
    assert disagreement(turned, trace, [small, large], result).adjoint


def test_a_check_is_cheaper_than_its_step():
    """Counted in products and backward passes: a step of CG makes more."""
    model, counts = mlp(3, 5, 4), {}
    lin = pgdfast.linearize(lambda: model(X) - Y, model.parameters(), check="never")
    result = model(X) - Y
    trace = Linearizer(model.parameters()).tracer.trace(result)

    def counted(name, product):
        def run(x):
            counts[name] = counts.get(name, 0) + 1
            return product(x)
        return run

    disagreement(Flat(counted("jvp", lin.jvp), counted("vjp", lin.vjp)), trace, list(model.parameters()), result)
    assert counts == {"jvp": 1, "vjp": 1}
    assert pgdfast.solve(lin, 0.1, solver="cg", cg=TIGHT).iterations > 3
