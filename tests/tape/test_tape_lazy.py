"""Tensors whose memory does not hold their entries, complex numbers, and tensors of no or one entry."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, agreement, jacobian_agreement, mlp, perturb, rand, relative
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import pgdfast
from pgdfast import reference
from pgdfast.linear import Linearizer

# PyTorch's first forward-mode derivative of a layer compiles something with torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
Z = torch.complex(rand(7, 5, seed=1), rand(7, 5, seed=2))
NEGATED = Z.conj().imag


def reference_gradient(closure, params):
    """J^T r by the reference."""
    ref = reference.linearize(closure, params)
    return ref.vjp(ref.residual)


# --- numbers that are negated when they are read ----------------------------------------------------------------------------


def test_the_constant_is_lazy():
    assert NEGATED.is_neg() and torch.equal(NEGATED, -Z.imag)


NEGATIVE = {
    "factor": lambda q: (torch.tanh(q) * NEGATED).sum(1) - 1,
    "matrix": lambda q: torch.tanh(q) @ NEGATED.T - 1,
    "left matrix": lambda q: NEGATED.T @ torch.tanh(q),
    "divisor": lambda q: q / NEGATED,
    "target": lambda q: F.mse_loss(torch.tanh(q), NEGATED),
    "weights": lambda q: (NEGATED.abs() * q.square()).mean() + ((q * NEGATED) ** 2).sum(),
    "maximum": lambda q: torch.maximum(q, NEGATED),
    "layer norm": lambda q: F.layer_norm(q, (5,), weight=NEGATED[0]),
    "window": lambda q: q[:, 1:] * NEGATED[:, :4],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NEGATIVE)
def test_negated_constants(name, backend):
    q = rand(7, 5, seed=3).requires_grad_()
    linearizer = Linearizer([q], backend)
    for visit in range(4):
        closure = lambda: NEGATIVE[name](q)  # noqa: E731
        assert relative(linearizer(closure).gradient(), reference_gradient(closure, [q])) < 1e-12
        assert jacobian_agreement(linearizer, closure, [q], seed=visit) < 1e-12
        perturb([q], seed=visit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_that_becomes_lazy(backend):
    q, lazy = rand(7, 5, seed=3).requires_grad_(), [False]
    linearizer = Linearizer([q], backend)
    for step in range(9):
        lazy[0] = step % 3 == 2
        closure = lambda: q.tanh() * (NEGATED if lazy[0] else NEGATED.clone())  # noqa: E731
        assert jacobian_agreement(linearizer, closure, [q]) < 1e-12


def test_negated_vectors_for_products():
    q = rand(7, 5, seed=3).requires_grad_()
    lin = pgdfast.linearize(lambda: q.tanh(), [q])
    v = NEGATED.reshape(-1)
    assert torch.equal(lin.jvp(v), lin.jvp(v.clone())) and torch.equal(lin.vjp(v), lin.vjp(v.clone()))


def test_negated_residuals():
    q = rand(7, 5, seed=3).requires_grad_()
    lin = pgdfast.linearize(lambda: (q.sum(1), NEGATED[0]), [q])
    assert torch.equal(lin.residual, torch.cat([q.detach().sum(1), -Z.imag[0]]))


# --- zeros without memory: residuals by forward-mode derivatives ------------------------------------------------------------


X = rand(6, 2, seed=4)


def by_dual_numbers(net, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def one(net):
    return lambda z: net(z[None])[0, 0]


FORWARD = {
    "jvp": lambda net: jvp(net, (X,), (torch.ones_like(X),))[1],
    "jvp and value": lambda net: sum(jvp(net, (X,), (torch.ones_like(X),))),
    "jvp twice": lambda net: jvp(lambda z: jvp(net, (z,), (torch.ones_like(X),))[1], (X,), (torch.ones_like(X),))[1],
    "jacfwd": lambda net: vmap(jacfwd(one(net)))(X),
    "hessian": lambda net: vmap(hessian(one(net)))(X),
    "laplacian": lambda net: vmap(hessian(one(net)))(X).diagonal(0, 1, 2).sum(-1),
    "jacfwd twice": lambda net: vmap(jacfwd(jacfwd(one(net))))(X),
    "reverse, forward": lambda net: vmap(jacrev(jacfwd(one(net))))(X),
    "product": lambda net: vmap(jacfwd(lambda z: torch.sin(z[0]) * one(net)(z) * z.square().sum()))(X),
    "loss": lambda net: F.mse_loss(vmap(hessian(one(net)))(X).sum((1, 2)), X[:, 0]) + F.mse_loss(net(X), X[:, :1]),
    "cross-entropy": lambda net: F.cross_entropy(vmap(jacfwd(one(net)))(X), torch.arange(6) % 2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_residuals(name, backend):
    model = mlp(2, 6, 1)
    params = list(model.parameters())
    linearizer = Linearizer(params, backend)
    closure = lambda: FORWARD[name](model)  # noqa: E731
    for visit in range(3):
        lin = linearizer(closure)
        assert lin.kernels().name != "double-backward"
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        perturb(params, seed=visit)


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule for torch..autograd..Identity")
def test_dual_numbers():
    model = mlp(2, 6, 1)
    params = list(model.parameters())
    assert jacobian_agreement(Linearizer(params), lambda: by_dual_numbers(model, X), params) < 1e-12


@pytest.mark.parametrize("solver", ["auto", "dual", "primal", "cg"])
def test_steps_on_forward_mode_residuals(solver):
    losses = []
    for backend in ("native", "reference"):
        model = mlp(2, 6, 1)
        optimizer = pgdfast.LM(model.parameters(), damping=0.1, solver=solver, backend=backend, cg=pgdfast.CG(2000, 1e-12))
        losses.append([float(optimizer.step(lambda m=model: FORWARD["loss"](m))) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8) and losses[0][-1] < losses[0][0]


# --- complex numbers --------------------------------------------------------------------------------------------------------


def fourier(q):
    return torch.fft.fft(torch.tanh(q))


COMPLEX = {
    "spectrum": lambda q: torch.view_as_real(fourier(q)).pow(2).sum(),
    "absolute": lambda q: fourier(q).abs(),
    "absolute squared": lambda q: fourier(q).abs().pow(2).sum(),
    "real part": lambda q: (q * Z).real,
    "imaginary part": lambda q: (torch.complex(q, q.tanh()) * Z).imag,
    "modulus of a product": lambda q: (torch.tanh(q) * Z).abs() - 1,
    "matrix": lambda q: (q.to(Z.dtype) @ Z.T).abs(),
}


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_between_real_ones(name):
    q = rand(7, 5, seed=3).requires_grad_()
    closure = lambda: COMPLEX[name](q)  # noqa: E731
    linearizer = Linearizer([q])
    for visit in range(2):
        assert jacobian_agreement(linearizer, closure, [q], seed=visit) < 1e-12
        perturb([q], seed=visit)


MODULI = {
    "norm": lambda z: torch.linalg.norm(z) ** 2,
    "mean norm": lambda z: torch.norm(z) ** 2 / 35,
    "row norms": lambda z: torch.linalg.vector_norm(z, dim=1).pow(2).sum(),
    "conjugate": lambda z: (z * z.conj()).real.sum(),
    "conjugate first": lambda z: (z.conj() * z).sum().real,
    "absolute": lambda z: (rand(7, 5, seed=2).square() * z.abs() ** 2).sum(),
    "inner product": lambda z: torch.vdot(z.flatten(), z.flatten()).real,
    "parts": lambda z: (z.real**2 + z.imag**2).mean(),
}


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("name", [*MODULI, "norm itself", "1-norm"])
def test_complex_moduli_are_squares_of_both_parts(name):
    q = rand(7, 5, seed=3).requires_grad_()
    loss = MODULI.get(name, lambda z: z.norm() if name == "norm itself" else z.abs().mean())
    linearizer = Linearizer([q])
    for visit in range(3):
        closure = lambda: loss(fourier(q))  # noqa: E731
        assert agreement(linearizer, closure, [q], seed=visit) < 1e-12
        lin, (expected,) = linearizer(closure), torch.autograd.grad(closure(), q)
        assert relative(lin.gradient(), expected.reshape(-1)) < 1e-12 and lin.has_squares_only == (name in MODULI)
        parts = jacrev(lambda t: torch.view_as_real(fourier(t)))(q.detach()).reshape(70, 35)
        if name == "norm":
            assert relative(lin.dense().T @ lin.dense(), 2 * parts.T @ parts) < 1e-12
        perturb([q], seed=visit)


# --- losses with dimensions -------------------------------------------------------------------------------------------------

Y = rand(7, 5, seed=5)


def gram_of_column(q):
    r = torch.tanh(q[:, :1]) - 1
    return r.T @ r


LOSSES = {
    "added to zeros": lambda q: torch.zeros(1, dtype=torch.float64) + F.mse_loss(torch.tanh(q), Y),
    "times a tensor": lambda q: torch.tensor([10.0], dtype=torch.float64) * F.mse_loss(torch.tanh(q), Y),
    "cross-entropy": lambda q: F.cross_entropy(q, torch.arange(7) % 5).reshape(1, 1),
    "binary cross-entropy": lambda q: F.binary_cross_entropy_with_logits(q, Y.sigmoid())[None],
    "kept dimension": lambda q: torch.tanh(q).square().sum(dim=(0, 1), keepdim=True),
    "product with its transpose": gram_of_column,
    "penalty": lambda q: (q**2).sum()[None],
}


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_with_dimensions_are_losses(name):
    q = rand(7, 5, seed=3).requires_grad_()
    closure = lambda: LOSSES[name](q)  # noqa: E731
    assert closure().numel() == 1 and closure().dim() > 0
    loss = closure().squeeze()
    expected, = torch.autograd.grad(loss, q)
    for backend in ("native", "torch"):
        linearizer = Linearizer([q], backend)
        for _ in range(3):
            lin = linearizer(closure)
            assert lin.scalar and lin.loss.shape == () and relative(lin.gradient(), expected.reshape(-1)) < 1e-12
        assert agreement(linearizer, closure, [q]) < 1e-12
    with torch.no_grad():
        assert relative(pgdfast.linearize(closure, [q]).gradient(), expected.reshape(-1)) < 1e-12
    for rule, backend in (("gain-ratio", "native"), ("sweep", "native"), ("gain-ratio", "reference")):
        p = q.detach().clone().requires_grad_()
        one, other = (pgdfast.LM([t], damping_rule=rule, backend=backend) for t in (q, p))
        for _ in range(3):
            loss = other.step(lambda p=p: LOSSES[name](p).squeeze())
            assert float(one.step(closure)) == pytest.approx(float(loss), rel=1e-12)
        with torch.no_grad():
            q.copy_(rand(7, 5, seed=3))
    closure, loss = (lambda: LOSSES[name](q)), LOSSES[name](q).squeeze()
    expected, = torch.autograd.grad(loss, q)
    lin = pgdfast.linearize(lambda: (closure(),), [q])
    assert lin.num_residuals == 1 and relative(lin.gradient(), loss.detach() * expected.reshape(-1)) < 1e-12


@pytest.mark.parametrize("residual", [
    lambda q: q[0, :1] ** 2 - 2, lambda q: (q @ rand(5, 1))[:1] - 1, lambda q: torch.tanh(q).sum().reshape(1),
    lambda q: q[:1, :1], lambda q: q[0].norm().reshape(1) - 1, lambda q: q.abs().mean().reshape(1, 1),
])
@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_single_residuals_stay_residuals(residual):
    q = rand(7, 5, seed=3).requires_grad_()
    lin, ref = pgdfast.linearize(lambda: residual(q), [q]), reference.linearize(lambda: residual(q), [q])
    assert lin.num_residuals == 1 and relative(lin.dense(), ref.dense()) < 1e-13 and relative(lin.residual, ref.residual) == 0


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("result", [
    lambda q: torch.tanh(q).square().sum().reshape(1) - 1, lambda q: F.mse_loss(q, Y)[None, None] - 0.1,
])
def test_squares_less_a_constant_may_be_a_loss_or_a_residual(result, backend):
    q = rand(7, 5, seed=3).requires_grad_()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shape \(1.* ends as a loss .* return loss.squeeze\(\).* the tuple \(r,\)"):
            pgdfast.LM([q], backend=backend).step(lambda: result(q))


def test_one_element_losses_in_both_phases_of_a_hybrid():
    p, q = (rand(7, 5, seed=3).requires_grad_() for _ in range(2))
    pairs = [
        (pgdfast.Hybrid(pgdfast.LM([t]), torch.optim.SGD([t], lr=1e-2), switch=2), closure)
        for t, closure in ((p, lambda: F.mse_loss(p.tanh(), Y)), (q, lambda: F.mse_loss(q.tanh(), Y)[None]))
    ]
    for _ in range(5):
        one, other = (float(optimizer.step(closure)) for optimizer, closure in pairs)
        assert one == pytest.approx(other, rel=1e-12)


# --- sizes of zero, and dimensions of a single number -----------------------------------------------------------------------

SMALL = {
    "sum": lambda t, d: t.sum(d), "mean": lambda t, d: t.mean(d, keepdim=True), "softmax": lambda t, d: t.softmax(d),
    "log_softmax": lambda t, d: t.log_softmax(d), "logsumexp": lambda t, d: t.logsumexp(d), "amax": lambda t, d: t.amax(d),
    "max": lambda t, d: t.max(d).values, "sort": lambda t, d: t.sort(d).values, "split": lambda t, d: t.split(2, d)[0],
    "chunk": lambda t, d: t.chunk(2, d)[-1], "cat": lambda t, d: torch.cat([t, t.detach(), 2 * t], d),
    "index": lambda t, d: t.index_select(d, torch.zeros(0, dtype=torch.long)), "stack": lambda t, d: torch.stack([t, t], d),
    "norm": lambda t, d: torch.linalg.vector_norm(t + 1, dim=d).square(), "squeeze": lambda t, d: t.squeeze(d),
    "flip": lambda t, d: t.flip(d), "roll": lambda t, d: t.roll(1, d), "cumsum": lambda t, d: t.cumsum(d),
    "cumprod": lambda t, d: t.cumprod(d), "logcumsumexp": lambda t, d: t.logcumsumexp(d), "prod": lambda t, d: t.prod(d),
    "cummax": lambda t, d: t.cummax(d).values, "median": lambda t, d: t.median(d).values,
    "pad": lambda t, d: F.pad(t, (1, 1)), "unfold": lambda t, d: t.unfold(d, 1, 1),
    "aminmax": lambda t, d: t.aminmax(dim=d).max,
    "add": lambda t, d: t.index_add(d, torch.zeros(0, dtype=torch.long), t[:0] if t.dim() == 1 else t.detach()[..., :0]),
    "scatter": lambda t, d: t.scatter_add(d, torch.zeros(t.shape, dtype=torch.long), t * t),
    "atan2": lambda t, d: torch.atan2(t, t + 3),
    "cdist": lambda t, d: torch.cdist(t, t + 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_sizes_of_zero_and_single_numbers(name, shape, backend):
    t, w = rand(*shape, 1, seed=1)[..., 0].requires_grad_(), rand(3, seed=2).requires_grad_()
    for dim in (0, -1):
        try:
            result = SMALL[name](1.5 * t, dim)
        except (RuntimeError, IndexError):   # an operation that PyTorch does not have for such a tensor
            continue
        if not result.isfinite().all():   # the mean of nothing
            continue
        for closure in (lambda d=dim: SMALL[name](1.5 * t, d).square().sum() + w.square().sum(),
                        lambda d=dim: (SMALL[name](1.5 * t, d).reshape(-1), w)):
            linearizer = Linearizer([t, w], backend)
            for _ in range(2):
                assert agreement(linearizer, closure, [t, w]) < 1e-12
