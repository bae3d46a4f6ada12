"""Complex parameters: J is that by their real and imaginary parts, whoever makes it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import agreement, jacobian_agreement, rand, relative
from torch.utils.checkpoint import checkpoint

import pgdfast
from pgdfast import reference
from pgdfast.linear import Linearizer
from pgdfast.tape import Tracer, real_size, real_views
from pgdfast.tape.walk import Fallback

RULES, FALLBACK = "rules", "fallback"


def number(*shape, seed, dtype=torch.complex128):
    """A complex leaf."""
    return torch.complex(rand(*shape, seed=seed), rand(*shape, seed=seed + 1)).mul(0.5).to(dtype).requires_grad_()


def problem(dtype=torch.complex128):
    """Parameters, real and complex in turn, and changing data x, y."""
    real = lambda *shape, seed: rand(*shape, seed=seed).to(dtype.to_real()).requires_grad_()  # noqa: E731
    params = [real(4, seed=1), number(4, 3, seed=2, dtype=dtype), real(3, seed=4), number(4, seed=5, dtype=dtype)]
    return params, {"x": rand(7, 3).to(dtype.to_real()), "y": rand(7, seed=7).to(dtype.to_real())}


def change(params, data, seed):
    """Other parameters and data, in place."""
    with torch.no_grad():
        for k, p in enumerate([*real_views(params), *data.values()]):
            p.add_(0.1 * rand(*p.shape, seed=seed + k).to(p.dtype))


def net(p, x):
    a, w, b, v = p
    return (a * torch.tanh(x.to(w.dtype) @ w.T)) @ v + (b * x).sum(1)


def spectral(p, d):
    """A Fourier layer with complex weights."""
    a, w, b, v = p
    modes = torch.fft.rfft(d["x"] * b) * w[:2, :2].sum(0)
    return torch.fft.irfft(modes, n=3).sum(1) * a.sum() + (v.conj() * v).real.sum() - d["y"]


def poles(p, d):
    a, w, b, v = p
    return torch.view_as_real((v / (1j * (2 + d["y"][:, None].sin()) - w[:, 0])).sum(1)) * a[:2] - b[1:]


RESIDUALS = {   # of (parameters, data)
    "network": lambda p, d: net(p, d["x"]).real - d["y"],
    "both parts": lambda p, d: torch.view_as_real(net(p, d["x"])),
    "modulus": lambda p, d: net(p, d["x"]).abs() - d["y"],
    "poles": poles,
    "fourier": spectral,
    "parts of a parameter": lambda p, d: (p[1].real.T * d["x"][:3, :1], p[1].imag @ d["x"].T, p[3].conj().imag * p[0], p[2]),
    "tied": lambda p, d: (d["x"].to(p[1].dtype) @ p[1].T @ p[1] @ p[1].mH).imag * p[0],
    "written in place": lambda p, d: torch.zeros(7, 4, dtype=p[1].dtype).index_put((torch.tensor([1, 5]),), p[1].T[:2]).imag,
    "not all": lambda p, d: (p[3] * p[3]).imag * p[0],
}


def without_rules(*_):
    raise Fallback("any operation")


@pytest.mark.parametrize("by", [RULES, FALLBACK])
@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.filterwarnings("ignore:pgdfast")
def test_jacobians(name, by, monkeypatch):
    params, data = problem()
    if by == FALLBACK:
        monkeypatch.setattr(Tracer, "_program", without_rules)
    linearizer = Linearizer(params, check="every")
    for step in range(4):   # from the third on read by the core
        closure = lambda: RESIDUALS[name](params, data)  # noqa: E731
        assert jacobian_agreement(linearizer, closure, params) < 1e-12
        lin = linearizer(closure)
        assert (lin._plan is not None) == (by == RULES) and lin.num_parameters == 4 + 24 + 3 + 8
        change(params, data, 10 * step)


def test_a_checkpoint_that_hides_its_parameters():
    params, data = problem()
    a, w, b, v = params

    def closure(call):
        h = w.mT * data["x"][:3, :1] * b[:, None]
        return call(lambda h: torch.tanh(h @ v), h).real * a[0]

    lin = pgdfast.linearize(lambda: closure(lambda f, h: checkpoint(f, h, use_reentrant=True)), params)
    assert relative(lin.dense(), reference.linearize(lambda: closure(lambda f, h: f(h)), params).dense()) < 1e-12


def test_the_numbers_stand_side_by_side():
    """By differences, without autograd's complex gradients."""
    params, data = problem()
    closure = lambda: net(params, data["x"]).real  # noqa: E731
    J, columns = pgdfast.linearize(closure, params).dense(), []
    for part in real_views(params):
        for entry in part.detach().view(-1):
            sides = []
            for shift in (1e-6, -2e-6):
                entry.add_(shift)
                sides.append(closure().detach())
            entry.add_(1e-6)
            columns.append((sides[0] - sides[1]) / 2e-6)
    assert relative(J, torch.stack(columns, 1)) < 1e-8


PENALTIES = {   # whether it is a penalty, and of which parameters
    "abs": (lambda a, w, b, v: w.abs().square().sum(), {1: 2.0}),
    "pairs": (lambda a, w, b, v: torch.view_as_real(v).square().mean(), {3: 0.25}),
    "all": (
        lambda a, w, b, v: a.square().sum() + 2 * w.abs().pow(2).sum() + torch.linalg.norm(v) ** 2, {0: 2.0, 1: 4.0, 3: 2.0}),
    "norm": (lambda a, w, b, v: torch.linalg.vector_norm(w), None),
    "weighted": (lambda a, w, b, v: (a.detach().abs() * v.abs() ** 2).sum(), {}),
    "conjugates": (lambda a, w, b, v: (w * w.conj()).real.sum(), {}),
    "factor": (lambda a, w, b, v: ((2 + 0j) * (w.conj() * w)).real.mean(), {}),
    "complex factor": (lambda a, w, b, v: ((2 - 3j) * (w * w.conj())).real.sum() + (1j * (v.conj() * v)).imag.sum(), {}),
    "complex divisor": (lambda a, w, b, v: (w * w.conj() / (2 - 3j)).imag.sum(), {}),
    "inner product": (lambda a, w, b, v: torch.vdot(v, v).real, {}),
    "sum of moduli": (lambda a, w, b, v: w.abs().sum(), {}),
    "real parts": (lambda a, w, b, v: w.real.square().sum() + v.imag.square().sum(), {}),
    "difference": (lambda a, w, b, v: (v - w[:, 0]).abs().square().sum(), {}),
}


@pytest.mark.parametrize("beside", [True, False], ids=["beside a loss", "alone"])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name, beside):
    penalty, expected = PENALTIES[name]
    params, data = problem()
    linearizer = Linearizer(params, check="every")

    def closure():
        loss = F.mse_loss(net(params, data["x"]).real, data["y"]) if beside else 0.0
        return loss + penalty(*params)

    for step in range(4):
        assert agreement(linearizer, closure, params) < 1e-12
        lin = linearizer(closure)
        assert lin._plan is not None and (expected is None or lin.penalties == expected)
        change(params, data, 10 * step)


@pytest.mark.parametrize("square", [lambda w: w * w, lambda w: w**2], ids=["product", "power"])
def test_the_square_of_a_complex_number_is_no_penalty(square):
    w = number(3, seed=1)
    for linearize in (pgdfast.linearize, reference.linearize):
        with pytest.raises(ValueError, match="squares is of complex numbers"):
            linearize(lambda: square(w).real.sum(), [w])


def test_distances_of_complex_numbers_are_refused():
    w = number(3, seed=1)
    with pytest.raises(ValueError, match="a distance of complex numbers; write torch.linalg.vector_norm"):
        pgdfast.linearize(lambda: torch.dist(w, torch.ones_like(w)), [w])


def test_single_precision():
    params, data = problem(torch.complex64)
    lin = pgdfast.linearize(lambda: net(params, data["x"]).real - data["y"], params)
    ref = reference.linearize(lambda: net(params, data["x"]).real - data["y"], params)
    assert lin.dtype == torch.float32 and lin._plan is not None and relative(lin.dense(), ref.dense()) < 1e-5
    assert [p.dtype for p in params] == [torch.float32, torch.complex64] * 2


def test_precisions_mixed():
    w, b = number(4, seed=1, dtype=torch.complex64), rand(4, seed=3).requires_grad_()
    closure = lambda: (w * b).imag + w.real  # noqa: E731
    lin = pgdfast.linearize(closure, [w, b])
    assert lin.dtype == torch.float64 and relative(lin.dense(), reference.linearize(closure, [w, b]).dense()) < 1e-6


def test_layouts():
    """Neither contiguous nor without an offset."""
    w = number(5, 4, seed=1).detach().T[1:].requires_grad_()
    closure = lambda: (w * torch.tanh(w)).imag  # noqa: E731
    assert real_size(w) == 30 and jacobian_agreement(Linearizer([w]), closure, [w]) < 1e-12


def test_changed_parameters_are_noticed():
    w = number(3, seed=1)
    lin = pgdfast.linearize(lambda: torch.tanh(w).imag, [w])
    w.data.mul_(2)   # PyTorch counts no writes through .data
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        lin.jvp(torch.zeros(6, dtype=torch.float64))


def test_lazy_conjugates_are_told_what_to_do():
    w = number(3, seed=1).detach().conj().requires_grad_()
    closure = lambda: torch.view_as_real(w.resolve_conj()) - 1  # noqa: E731
    for make in (lambda: pgdfast.linearize(closure, [w]), lambda: pgdfast.LM([w]).step(closure)):
        with pytest.raises(ValueError, match=r"parameter 0, of shape \(3,\), is a lazy conjugate; .* w.resolve_conj"):
            make()
