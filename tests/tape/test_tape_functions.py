"""torch.autograd.Functions and checkpoints read as single nodes; closures that torch.compile or torch.jit compiled."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import jacobian_agreement, mlp, perturb, rand, relative, snapshot, unchanged
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pgdfast
from pgdfast import reference
from pgdfast.linear import Linearizer
from pgdfast.tape.rules import functions

N = 6
X, Y = rand(N, 4, seed=1), rand(N, 3, seed=2)


def function(forward, backward, **names):
    """A torch.autograd.Function of f(ctx, *inputs) and its backward."""
    return type("Written", (torch.autograd.Function,), {
        "forward": staticmethod(forward), "backward": staticmethod(backward), **names}).apply


def keep(ctx, result, *tensors):
    """The result, with tensors saved for the backward."""
    ctx.save_for_backward(*tensors)
    return result


def softmax_forward(ctx, x, factor):
    p = x.softmax(-1)
    ctx.save_for_backward(p)
    ctx.factor = factor
    place = p.argmax(-1)
    ctx.mark_non_differentiable(place)
    return p, factor * p[:, 0], place


def softmax_backward(ctx, g, first, _):
    (p,) = ctx.saved_tensors
    g = g + ctx.factor * first[:, None] * torch.eye(p.shape[1], dtype=p.dtype)[0]
    return p * (g - (p * g).sum(-1, keepdim=True)), None


def unmaterialized_forward(ctx, x):
    ctx.set_materialize_grads(False)
    return 2 * x, x + 1


def unmaterialized_backward(ctx, g, h):
    return (0 if g is None else 2 * g) + (0 if h is None else h)


cube = function(lambda ctx, x: keep(ctx, x**3, x), lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g)
by_numpy = function(
    lambda ctx, x: keep(ctx, torch.from_numpy(np.sin(x.detach().numpy())), x),
    once_differentiable(lambda ctx, g: torch.from_numpy(np.cos(ctx.saved_tensors[0].numpy()) * g.numpy())))
linear = function(
    lambda ctx, x, w, b: keep(ctx, x @ w.T + b, x, w),
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.T @ ctx.saved_tensors[0], g.sum(0)))
relu = function(lambda ctx, x: keep(ctx, x.clamp(min=0), x), lambda ctx, g: g * (ctx.saved_tensors[0] > 0))
columns = function(
    lambda ctx, x, s: keep(ctx, x.cumsum(0) * s, x, s),
    lambda ctx, g: ((g * ctx.saved_tensors[1]).flip(0).cumsum(0).flip(0), g * ctx.saved_tensors[0].cumsum(0)))
length = function(
    lambda ctx, x: keep(ctx, x.norm(), x), lambda ctx, g: g * ctx.saved_tensors[0] / ctx.saved_tensors[0].norm())
transposed = function(lambda ctx, x: 2 * x.T, lambda ctx, g: 2 * g.T)
flat = function(lambda ctx, x: x.sign(), lambda ctx, g: None)
softmax = function(softmax_forward, softmax_backward)
unmaterialized = function(unmaterialized_forward, unmaterialized_backward)
broadcast = function(
    lambda ctx, x, s: keep(ctx, x * s, x, s), lambda ctx, g: (g * ctx.saved_tensors[1], g * ctx.saved_tensors[0]))
inverted = function(lambda ctx, x: x.clone(), lambda ctx, g: -2 * g)   # with a derivative that it has not

# {name: (function of the hidden layer (N, 4) and a parameter s (2, 4), calls of the backward at a step)}
FUNCTIONS = {
    "elementwise": (lambda h, s: cube(h), 2),
    "of a stack": (lambda h, s: cube(h.view(N, 2, 2)).flatten(1), 2),
    "by numpy": (lambda h, s: by_numpy(h), 2),
    "with a threshold": (lambda h, s: relu(h), 2),
    "by rows, several outputs": (lambda h, s: softmax(h, 2.0)[0] * softmax(h, 2.0)[1][:, None], 7),
    "of weights": (lambda h, s: linear(h, s, s[:, 0]) @ torch.ones(2, 4).double(), 5),
    "by columns": (lambda h, s: columns(h, s[0]), 7),
    "that broadcasts": (lambda h, s: broadcast(h, s[:1]), 8),
    "of everything": (lambda h, s: length(h) * h, 2),
    "transposed": (lambda h, s: transposed(h).T, 2),
    "of no slope": (lambda h, s: flat(h) + h, 1),
    "without zeros": (lambda h, s: unmaterialized(h)[0] * unmaterialized(h)[1], 4),
    "whose derivative is another's": (lambda h, s: inverted(h), 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_agrees_with_the_reference(name, monkeypatch):
    apply, calls = FUNCTIONS[name]
    first, last, s = mlp(4, 4), mlp(4, 3, seed=1), rand(2, 4, seed=5).requires_grad_()
    params = [*first.parameters(), *last.parameters(), s]
    linearizer, counted = Linearizer(params), []
    call = functions._Backward.__call__
    monkeypatch.setattr(functions._Backward, "__call__", lambda *given: counted.append(1) or call(*given))
    for visit in range(4):
        closure = lambda: last(torch.tanh(apply(torch.tanh(first((1 + 0.1 * visit) * X)), s)))  # noqa: B023, E731
        before = len(counted)
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        assert visit == 0 or len(counted) - before == calls
        perturb(params, seed=visit)
    lin = linearizer(closure)
    assert lin.kernels().name == "native" and len(linearizer._plans) == 1
    assert name in ("by columns", "of everything") or lin.row_layout().num_rows == len(X)


def test_another_pattern_is_found_when_it_comes():
    """Elementwise at first, by rows later."""
    kind = ["elementwise"]

    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g if kind[0] == "elementwise" else (2 * x * g).cumsum(1)

    changing = function(lambda ctx, x: keep(ctx, x**2, x), backward)
    w = rand(30, 10).requires_grad_()
    linearizer = Linearizer([w])
    for kind[0] in ("elementwise", "elementwise", "elementwise", "rows", "rows", "rows", "elementwise"):
        lin, ref = linearizer(lambda: changing(w)), reference.linearize(lambda: changing(w), [w])
        assert lin.kernels().name == "native" and relative(lin.dense(), ref.dense()) < 1e-12
        perturb([w])


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_what_its_own_backward_cannot_tell_falls_back():
    w = rand(30, 10).requires_grad_()
    dense = function(lambda ctx, x: 2 * x, lambda ctx, g: (g @ torch.ones(10, 10).double()).sum(0).expand(30, 10) + 2 * g)
    lin = Linearizer([w])(lambda: dense(w))
    assert lin.kernels().name == "double-backward"
    assert relative(lin.dense(), reference.linearize(lambda: dense(w), [w]).dense()) < 1e-12
    shy = function(lambda ctx, x: (2 * x, 3 * x), lambda ctx, g, h: 2 * g + 3 * h if h.any() else 1 / 0)
    lin = Linearizer([w])(lambda: shy(w))
    assert lin.kernels().name == "double-backward" and "called by itself" in lin._missing
    clipped = function(lambda ctx, x: 2 * x, lambda ctx, g: (2 * g).clamp(-0.1, 0.1))
    with pytest.raises(ValueError, match="not linear in the gradient"):
        Linearizer([w])(lambda: clipped(w))


# --- checkpoints ------------------------------------------------------------------------------------------------------------


def two(x, y):
    """Of two tensors two."""
    return A(x) * y.sin(), torch.tanh(y)


def dropped(x):
    return F.dropout(A(x), 0.3)


A, B, C = (mlp(4, 4, 4, seed=k) for k in (1, 2, 3))
# {name: what runs with `run` in place of a plain call}
CHECKPOINTS = {
    "in the middle": lambda run, x: C(run(B, A(x))),
    "of inputs alone": lambda run, x: C(run(B, x.clone().requires_grad_())),
    "of everything": lambda run, x: run(B, x.clone().requires_grad_()),
    "of two inputs": lambda run, x: torch.cat(run(two, B(x), C(x)), 1),
    "in another": lambda run, x: run(lambda y: C(run(B, y)), A(x)),
    "with dropout": lambda run, x: C(run(dropped, B(x))),
    "twice the same": lambda run, x: run(B, run(B, A(x))),
    "of nothing": lambda run, x: C(run(lambda y: y, A(x))),
    "of a view": lambda run, x: C(run(lambda y: y.T, A(x)).reshape(-1, 4)),
    "of what no parameter reaches": lambda run, x: C(x) * run(torch.sin, x.clone().requires_grad_()),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_agrees_with_a_plain_call(name, reentrant):
    params = [*A.parameters(), *B.parameters(), *C.parameters()]
    before, linearizer = snapshot(params), Linearizer(params)
    run = lambda f, *given: checkpoint(f, *given, use_reentrant=reentrant)  # noqa: E731
    for visit in range(4):
        x = (1 + 0.1 * visit) * X
        torch.manual_seed(visit)
        lin = linearizer(lambda: CHECKPOINTS[name](run, x))  # noqa: B023
        torch.manual_seed(visit)
        ref = reference.linearize(lambda: CHECKPOINTS[name](lambda f, *given: f(*given), x), params)  # noqa: B023
        assert lin.kernels().name == "native"
        assert relative(lin.residual, ref.residual) < 1e-13 and relative(lin.dense(), ref.dense()) < 1e-12
        perturb(params, seed=visit)
    assert len(linearizer._plans) == 1
    with torch.no_grad():
        for p, q in zip(params, before, strict=True):
            p.copy_(q)


def test_steps_with_a_checkpoint_are_those_without():
    ends = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint_sequential(f, 2, x, use_reentrant=True)):
        model = mlp(4, 5, 5, 3)
        optimizer = pgdfast.LM(model.parameters())
        x = X.clone().requires_grad_()
        ends.append([optimizer.step(lambda run=run, model=model, x=x: F.mse_loss(run(model, x), Y)) for _ in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_beside_an_operation_without_a_rule_says_so(inside, monkeypatch):
    monkeypatch.setattr(functions, "_MOST_CALLS", 0)
    params, before = list(B.parameters()), snapshot(B.parameters())
    other = function(lambda ctx, x: 2 * x, lambda ctx, g: 2 * g)

    def closure():
        h = checkpoint(lambda x: other(B(x)) if inside else B(x), X.clone().requires_grad_(), use_reentrant=True)
        return F.mse_loss((h if inside else other(h))[:, :3], Y)

    with pytest.raises(ValueError, match="CheckpointFunctionBackward.*no tape rule for .*; pass use_reentrant=False"):
        pgdfast.LM(params).step(closure)
    assert unchanged(params, before)


# --- compiled parts ---------------------------------------------------------------------------------------------------------

COMPILED = """
import sys, warnings
sys.path[:0] = sys.argv[1:]
import torch, torch.nn.functional as F
import pgdfast
from helpers import mlp, rand
X, Y = rand(6, 4, seed=1), rand(6, 3, seed=2)
def losses(wrap):
    model = mlp(4, 5, 3)
    run, optimizer = wrap(model), pgdfast.LM(model.parameters())
    return [float(optimizer.step(lambda: F.mse_loss(run((1 + 0.1 * k) * X), Y))) for k in range(5)]
def check(wrap):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = losses(wrap)
    assert all(abs(a - b) <= 1e-12 * b for a, b in zip(found, plain)), (found, plain)
    return [str(w.message) for w in caught if str(w.message).startswith("pgdfast")]
plain = losses(lambda model: model)
"""


def in_a_process(code):
    """Run code behind COMPILED in a fresh interpreter, since what is compiled stays so."""
    done = subprocess.run([sys.executable, "-c", COMPILED + code, *sys.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_original_of_a_compiled_module_is_run():
    in_a_process("""
told = check(lambda model: torch.compile(model, backend="aot_eager"))
assert len(told) == 1 and "from now on LM runs the original" in told[0], told
assert check(lambda model: torch.compile(model, backend="aot_eager")) == []
model = mlp(4, 5, 3)
compiled = torch.compile(model, backend="aot_eager")
assert pgdfast.linearize(lambda: compiled(X), model.parameters()).kernels().name == "native"
assert type(compiled(X).grad_fn).__name__ == "CompiledFunctionBackward"   # outside of LM it is compiled as before
""")


def test_scripted_modules_are_read_unless_they_ran_before():
    in_a_process("""
assert check(torch.jit.script) == []
assert check(lambda model: torch.jit.trace(model, X)) == []
def warm(model):
    scripted = torch.jit.script(model)
    for _ in range(3):
        scripted(X)
    return scripted
told = check(warm)
assert len(told) == 1 and "torch.jit had compiled" in told[0], told
""")


def test_an_opaque_node_is_named():
    """What stays compiled under LM, as nodes of aot_function do."""
    opaque = function(lambda ctx, x: 2 * x, lambda ctx, g: 2 * g, __module__="torch._functorch.somewhere")
    model = mlp(4, 5, 3)
    with pytest.raises(ValueError, match="WrittenBackward, an opaque node of torch.compile; call the uncompiled model"):
        Linearizer(model.parameters())(lambda: F.mse_loss(opaque(model(X)), Y))
