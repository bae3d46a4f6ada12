"""Cases for the rule of pointwise operations: functions of parameters a (3, 4), b (3, 4), c (4,), m (4, 5)."""

import torch
import torch.nn.functional as F
from helpers import gradient, rand

aten = torch.ops.aten
C = rand(3, 4, seed=9)   # a constant
POSITIVE = C.abs() + 0.3


def inside(x):
    """Numbers in (-1, 1)."""
    return 0.9 * torch.tanh(x)


def positive(x):
    """Numbers above 0.2, on a slope."""
    return x.abs() + 0.2


def seeded(function):
    """A function that draws, with the same draws at each call."""
    def run(*inputs):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return function(*inputs)

    return run


def first(act):
    """act'(x) of a layer, by nested autograd.grad."""
    def run(a, b, c, m):
        x = C.clone().requires_grad_()
        return gradient(act(F.linear(x, a, c[:3])), x) * b

    return run


POINTWISE = {
    "inverse functions": lambda a, b, c, m: (
        torch.acos(inside(a)), torch.asin(inside(a)), torch.atanh(inside(b)), torch.asinh(a), torch.acosh(1.1 + positive(a))),
    "atan2": lambda a, b, c, m: (torch.atan2(a, b), torch.atan2(C, c), torch.atan2(c, C), torch.atan2(a, c), torch.hypot(a, c)),
    "error functions": lambda a, b, c, m: (
        torch.erfc(a), torch.erfinv(inside(a)), torch.special.erfcx(a), torch.special.ndtri(torch.sigmoid(a)),
        torch.special.log_ndtr(a), torch.special.ndtr(a)),
    "gamma functions": lambda a, b, c, m: (
        torch.lgamma(positive(a)), torch.digamma(positive(a)), torch.polygamma(2, positive(b)), torch.mvlgamma(a.abs() + 2, 2),
        torch.igamma(POSITIVE, positive(c)), torch.igammac(POSITIVE, positive(b))),
    "Bessel functions": lambda a, b, c, m: (
        torch.i0(a), torch.special.i0e(a), torch.special.i1(a), torch.special.i1e(b)),
    "logarithms": lambda a, b, c, m: (
        torch.log10(positive(a)), torch.exp2(a), torch.logit(torch.sigmoid(a)), torch.logit(torch.sigmoid(b), eps=0.3),
        torch.special.entr(positive(a))),
    "logarithms of two": lambda a, b, c, m: (
        torch.logaddexp(a, c), torch.logaddexp2(C, b), torch.xlogy(a, positive(c)), torch.xlogy(2.0, positive(a)),
        torch.xlogy(a, 3.0), torch.xlogy(C, positive(b))),
    "logarithms of one more": lambda a, b, c, m: (
        torch.special.xlog1py(a, positive(c)), torch.special.xlog1py(2.0, positive(a)), torch.special.xlog1py(a, 3.0)),
    "zeta": lambda a, b, c, m: (torch.special.zeta(2 + POSITIVE, positive(a)), torch.special.zeta(2.5, positive(c))),
    "shrinking": lambda a, b, c, m: (
        F.hardshrink(a, 0.3), F.softshrink(a, 0.3), F.tanhshrink(a), F.hardswish(3 * a), F.relu6(3 * a),
        F.threshold(a, 0.2, -1.0)),
    "prelu": lambda a, b, c, m: (
        F.prelu(a, c), F.prelu(a, b[0, :1]), F.prelu(C, c), F.prelu(a, C[0]), F.prelu(a.view(3, 2, 2), b[0, :2])),
    "rrelu": seeded(lambda a, b, c, m: (F.rrelu(a, training=True), F.rrelu(1.0 * b, 0.1, 0.5))),
    "clamp by tensors": lambda a, b, c, m: (
        torch.clamp(a, C - 0.5, C + 0.5), torch.clamp(a, c, c + b.abs()), torch.clamp(a, min=b), torch.clamp(C, max=b),
        torch.clamp_min(a, b), torch.clamp_max(a, c)),
    "fmax and fmin": lambda a, b, c, m: (torch.fmax(a, c), torch.fmin(C, b), torch.fmax(a, a.detach())),
    "remainders": lambda a, b, c, m: (
        torch.fmod(a, 0.7), torch.remainder(a, 0.7), torch.fmod(a, POSITIVE), torch.remainder(a, positive(b)),
        torch.fmod(C, positive(c))),
    "rounding": lambda a, b, c, m: (
        a - torch.round(a), torch.floor(a) * b, torch.ceil(a) * b, torch.trunc(a) + b, torch.frac(a),
        torch.round(a, decimals=2) + b, torch.sign(a) * b, torch.div(a, b, rounding_mode="floor") * b,
        torch.div(a, 0.3, rounding_mode="trunc") * b,
        aten.div.Scalar_mode(a, 0.3, rounding_mode="floor") * b),
    "copysign": lambda a, b, c, m: (torch.copysign(a, b), torch.copysign(a, -1.0), torch.copysign(C, c) + a),
    "nan_to_num": lambda a, b, c, m: torch.nan_to_num(torch.where(C > 1, torch.nan, a), 0.5),
    "degrees": lambda a, b, c, m: (torch.deg2rad(a), torch.rad2deg(b)),
    "sinc": lambda a, b, c, m: (torch.sinc(a), torch.sinc(a - a.detach())),
    "lerp": lambda a, b, c, m: (
        torch.lerp(a, c, 0.3), torch.lerp(a, b, c), torch.lerp(C, b, C), torch.lerp(a, C, 2.0), torch.lerp(C[0], C[1], c)),
    "addcdiv": lambda a, b, c, m: (
        torch.addcdiv(a, b, positive(c), value=0.3), torch.addcdiv(C, C, positive(b)), torch.addcdiv(c, C, POSITIVE)),
    "ldexp": lambda a, b, c, m: (torch.ldexp(a, torch.tensor([1, 2, -1, 0])), torch.ldexp(a, c)),
    "float powers": lambda a, b, c, m: (torch.float_power(positive(a), 1.7), torch.float_power(positive(a), c)),
    "negative view": lambda a, b, c, m: torch._neg_view(a) * b,
    "zero in place": lambda a, b, c, m: (2.0 * a).zero_() + b,
    "drawn": seeded(lambda a, b, c, m: torch.bernoulli(torch.sigmoid(a)) * b),
    "broadcast parameters": lambda a, b, c, m: (
        torch.atan2(a[:, :1], c), torch.logaddexp(a[:1], b[:, :1]), torch.hypot(c[0], a)),
    "activation": lambda a, b, c, m: (F.hardswish(C @ m), torch.erfc(F.linear(C, a, c[:3])), torch.atan2(C @ m, m[0])),
    "derivative of hardswish": first(lambda x: F.hardswish(3 * x)),
    "derivative of hardshrink": first(lambda x: F.hardshrink(x, 0.3) ** 2),
    "derivative of softshrink": first(lambda x: F.softshrink(x, 0.3) ** 2),
    "derivative of prelu": lambda a, b, c, m: first(lambda x: F.prelu(x, a[0, :1]) ** 2)(a, b, c, m),
    "derivative of rrelu": seeded(first(lambda x: F.rrelu(x, training=True) ** 2)),
    "derivative of lgamma": first(lambda x: torch.lgamma(x.abs() + 0.5)),
    "derivative of atan2": first(lambda x: torch.atan2(x, x + 3)),
}
