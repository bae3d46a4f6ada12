"""Operations without a rule: the double-backward form, announced once by name."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SOLVERS,
    TIGHT,
    agreement,
    damping_of,
    forget_rules,
    jacobian_agreement,
    mlp,
    perturb,
    rand,
    relative,
)

import pgdfast
from pgdfast import reference
from pgdfast.linear import Linearizer, linearization

X, Y = rand(6, 3, seed=1), rand(6, 4, seed=2)
OPERATIONS = {  # name on the tape: a function of the network's outputs (6, 4)
    "CumsumBackward0": lambda z: z.cumsum(0),
    "RollBackward0": lambda z: z.roll(1, 0) * z,
    "ProdBackward1": lambda z: z.prod(1),
}


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch):
    monkeypatch.setattr(linearization, "_announced", set())


@pytest.fixture(autouse=True)
def rules_taken_away(monkeypatch):
    """Operations that have rules serve as examples of those that have none."""
    forget_rules(monkeypatch, *OPERATIONS, "I0Backward0")


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("name", OPERATIONS)
def test_fallback_agrees_with_the_reference(name):
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    for visit in range(2):
        assert (
            jacobian_agreement(linearizer, lambda: OPERATIONS[name](model(X)), params, seed=visit)
            < 1e-12
        )
        perturb(params, seed=visit)


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize(
    "form",
    [
        lambda z: F.mse_loss(z, Y),
        lambda z: F.mse_loss(z, z.detach().roll(1, 1) * z),
        lambda z: F.cross_entropy(z, torch.tensor([0, 1, 2, -100, 3, 1])),
        lambda z: F.binary_cross_entropy_with_logits(z, Y.sigmoid()),
        lambda z: (Y.abs() * z.square()).mean() / 7,
        lambda z: (z - Y, z[:, 0]),
    ],
)
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_fallback_of_every_form(form, penalty):
    model = mlp(3, 5, 4)
    params = list(model.parameters())

    def closure():
        result = form(model(X).cumsum(0))
        if isinstance(result, tuple):
            return (*result, penalty**0.5 * params[0])
        return result + 0.5 * penalty * params[0].square().sum() if penalty else result

    assert agreement(Linearizer(params), closure, params) < 1e-12


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("solver", SOLVERS)
def test_fallback_under_every_solver(solver):
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    closure = lambda: F.mse_loss(model(X).cumsum(0), Y)  # noqa: E731
    lin, ref = pgdfast.linearize(closure, params), reference.linearize(closure, params)
    mu = damping_of(ref)
    step = pgdfast.solve(lin, mu, solver=solver, cg=TIGHT).step
    assert relative(step, reference.solve(ref, mu).step) < 1e-9


@pytest.mark.parametrize("name", OPERATIONS)
def test_fallback_is_announced_once_by_name(name):
    model = mlp(3, 5, 4)
    params = list(model.parameters())
    with pytest.warns(UserWarning, match=f"no tape rule for .*{name}.* double-backward") as caught:
        pgdfast.linearize(lambda: OPERATIONS[name](model(X)), params)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgdfast.linearize(lambda: 2 * OPERATIONS[name](model(X)), params)
        optimizer = pgdfast.LM(params)
        for _ in range(2):
            optimizer.step(lambda: OPERATIONS[name](model(X)))


def test_step_announces_at_the_line_of_the_call():
    model = mlp(3, 5, 4)
    with pytest.warns(UserWarning, match="CumsumBackward0") as caught:
        pgdfast.LM(model.parameters()).step(lambda: model(X).cumsum(0))
    assert caught[0].filename == __file__


def test_operation_that_no_parameter_reaches_needs_no_rule():
    model = mlp(3, 5, 4)
    x = X.clone().requires_grad_()
    params = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            jacobian_agreement(Linearizer(params), lambda: model(X) * x.cumsum(0).sum(), params)
            < 1e-12
        )


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_a_rejected_step_can_be_solved_anew():
    """The tape that autograd reads again saw the parameters before the trial that was undone."""
    model = mlp(1, 5, 1)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None]
    optimizer = pgdfast.LM(model.parameters(), damping=1e-8)
    optimizer.step(lambda: torch.special.i0(model(x)) - torch.sin(4 * x))
    assert optimizer.report.attempts > 1 and optimizer.report.status == "accepted"


@pytest.mark.parametrize("outputs", [(1,), (2,), (0, 1, 2)])
def test_outputs_that_a_rule_does_not_write_are_left_to_autograd(outputs):
    """Means and reciprocal deviations of groups, which a closure seldom reads."""
    x, w = rand(6, 4, seed=1).requires_grad_(), rand(4, seed=2).requires_grad_()

    def closure(*_):
        normed = torch.native_group_norm(x, w, None, 6, 4, 1, 2, 1e-5)
        return torch.cat([normed[k].reshape(-1) for k in outputs]).sin()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lin = pgdfast.linearize(closure, [x, w])
    result = closure()
    rows = [torch.autograd.grad(r, [x, w], retain_graph=True, materialize_grads=True) for r in result]
    rows = [torch.cat([g.reshape(-1) for g in row]) for row in rows]
    assert lin.kernels().name == "double-backward" and relative(lin.dense(), torch.stack(rows)) < 1e-12
    recomputed = lambda: torch.utils.checkpoint.checkpoint(closure, x, w, use_reentrant=True)  # noqa: E731
    with pytest.raises(ValueError, match="no tape rule for output . of NativeGroupNormBackward0; pass use_reentrant=False"):
        pgdfast.linearize(recomputed, [x, w])
