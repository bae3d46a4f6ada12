"""Elementwise operations: the output tangent is the input tangent times a coefficient read off the tape."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..program import UnsupportedStructure
from .table import rule, signed


def _unary(node: str, saved: str, derivative) -> None:
    @rule(node, saved=saved)
    def apply(op, *values):
        op.scale(0, derivative(*values))


def _gelu_derivative(approximate: str, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)


def _relu_like(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype)


def _leaky(slope: float, x: torch.Tensor) -> torch.Tensor:
    # torch.where of two numbers would be of default precision.
    return torch.full_like(x, slope).masked_fill_(x > 0, 1.0)


_unary("ReluBackward0", "result", _relu_like)
_unary("GeluBackward0", "approximate self", _gelu_derivative)
_unary("SinBackward0", "self", torch.cos)
_unary("CosBackward0", "self", lambda x: -torch.sin(x))
_unary("TanBackward0", "result", lambda y: 1 + y * y)
_unary("SinhBackward0", "self", torch.cosh)
_unary("CoshBackward0", "self", torch.sinh)
_unary("AtanBackward0", "self", lambda x: 1 / (1 + x * x))
_unary("ExpBackward0", "result", lambda y: y)
_unary("Expm1Backward0", "result", lambda y: y + 1)
_unary("LogBackward0", "self", torch.reciprocal)
_unary("Log1PBackward0", "self", lambda x: 1 / (1 + x))
_unary("Log2Backward0", "self", lambda x: 1 / (x * math.log(2)))
_unary("SqrtBackward0", "result", lambda y: 0.5 / y)
_unary("RsqrtBackward0", "result", lambda y: -0.5 * y**3)
_unary("ReciprocalBackward0", "result", lambda y: -y * y)
_unary("AbsBackward0", "self", torch.sign)
_unary("ErfBackward0", "self", lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x))
_unary("LeakyReluBackward0", "negative_slope self", _leaky)
_unary("LeakyReluBackward1", "negative_slope result", _leaky)
_unary("LogSigmoidBackward0", "self", lambda x: torch.sigmoid(-x))
_unary("ClampMinBackward0", "min self", lambda low, x: (x >= low).to(x.dtype))
_unary("ClampMaxBackward0", "max self", lambda high, x: (x <= high).to(x.dtype))
_unary("MaskedFillBackward0", "mask", lambda mask: ~mask)
_unary("SgnBackward0", "", lambda: 0.0)


@rule("TanhBackward0", saved="result")
def tanh(op, y):
    op.scale(0, y, function="1 - c^2")


@rule("SigmoidBackward0", saved="result")
def sigmoid(op, y):
    op.scale(0, y, function="c - c^2")


@rule("SiluBackward0", saved="self")
def silu(op, x):
    s = torch.sigmoid(x)
    op.scale(0, s * (1 + x * (1 - s)))


@rule("SoftplusBackward0", saved="beta self threshold")
def softplus(op, beta, x, threshold):
    op.scale(0, torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta)).to(x.dtype))


@rule("MishBackward0", saved="self")
def mish(op, x):
    t = torch.tanh(F.softplus(x))
    op.scale(0, t + x * torch.sigmoid(x) * (1 - t * t))


@rule("CeluBackward0", saved="alpha self")
def celu(op, alpha, x):
    # PyTorch's own backward rounds 1 / alpha to float32, which puts it off by 1e-8 in float64.
    op.scale(0, torch.where(x > 0, 1.0, torch.exp(x / alpha)).to(x.dtype))


@rule("CeluBackward1", saved="alpha result")
def celu_in_place(op, alpha, y):
    op.scale(0, torch.where(y > 0, 1.0, 1 + y / alpha).to(y.dtype))


@rule("HardsigmoidBackward0", saved="self")
def hardsigmoid(op, x):
    op.scale(0, ((x > -3) & (x < 3)).to(x.dtype) / 6)


@rule("EluBackward1", saved="alpha input_scale result scale")
def elu_in_place(op, alpha, input_scale, y, scale):
    op.scale(0, torch.where(y > 0, float(scale), input_scale * (y + alpha * scale)).to(y.dtype))


@rule("EluBackward0", saved="alpha input_scale scale self")
def elu(op, alpha, input_scale, scale, x):
    negative = alpha * input_scale * scale * torch.exp(x * input_scale)
    op.scale(0, torch.where(x > 0, float(scale), negative).to(x.dtype))


@rule("ClampBackward1", saved="max min self")
def clamp(op, high, low, x):
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = inside & (x >= low)
    if high is not None:
        inside = inside & (x <= high)
    op.scale(0, inside.to(x.dtype))


@rule("HardtanhBackward0", saved="max_val min_val self")
def hardtanh(op, high, low, x):
    op.scale(0, ((x > low) & (x < high)).to(x.dtype))


@rule("NativeDropoutBackward0", saved="p result1")
def dropout(op, p, mask):
    # With train=False nothing is dropped or scaled; the tape does not say so, but such a mask is full.
    if p > 0 and bool(mask.all()):
        raise UnsupportedStructure("a dropout that dropped nothing")
    op.scale(0, mask.to(torch.float64) * (1 / (1 - p) if p < 1 else 0.0))


@rule("TrilBackward0", saved="diagonal", shape=True)
def tril(op, diagonal, shape, device):
    op.scale(0, torch.ones(shape[-2:], dtype=torch.bool, device=device).tril(signed(diagonal)))


@rule("TriuBackward0", saved="diagonal", shape=True)
def triu(op, diagonal, shape, device):
    op.scale(0, torch.ones(shape[-2:], dtype=torch.bool, device=device).triu(signed(diagonal)))


@rule("GluBackward0", saved="dim self")
def glu(op, dim, x):
    """Of the halves a and b of x: a sigmoid(b)."""
    dim = signed(dim)
    a, b = x.chunk(2, dim)
    s = torch.sigmoid(b)
    op.view(0, lambda x: x.chunk(2, dim)[0], out="a")
    op.view(0, lambda x: x.chunk(2, dim)[1], out="b")
    op.scale("a", s)
    op.scale("b", a * s * (1 - s))


@rule("NegBackward0")
def neg(op):
    op.add(0, -1.0)


@rule("CloneBackward0", "AliasBackward0", "ToCopyBackward0", "LiftBackward0", "LiftFreshBackward0")
def identity(op):
    op.view(0, lambda x: x)


@rule("AddBackward0", saved="alpha")
def add(op, alpha):
    if op.needs[0]:
        op.add(0)
    if op.needs[1]:
        op.add(1, alpha)


@rule("SubBackward0", saved="alpha")
def sub(op, alpha):
    if op.needs[0]:
        op.add(0)
    if op.needs[1]:
        op.add(1, -alpha)


@rule("AddBackward1", "SubBackward1")
def add_number(op):
    op.view(0, lambda x: x)


@rule("RsubBackward0", saved="alpha")
def rsub(op, alpha):
    if op.needs[0]:
        op.add(0, -alpha)
    if op.needs[1]:
        op.add(1)


@rule("RsubBackward1", saved="alpha")
def rsub_number(op, alpha):
    op.add(0, -alpha)


@rule("MulBackward0", saved="other self")
def mul(op, other, self):
    if op.needs[0]:
        op.scale(0, other)
    if op.needs[1]:
        op.scale(1, self)


@rule("MulBackward1", saved="other")
def mul_number(op, other):
    if other == 1:   # function transforms write it so; as part of the structure it costs nothing (tape/simplify.py)
        op.add(0)
    else:
        op.scale(0, other)


@rule("DivBackward0", saved="other self")
def div(op, other, self):
    if op.needs[0]:
        # In float64: the tape keeps the number in `x / 7` as a tensor whose reciprocal would be of default precision.
        op.scale(0, torch.ones_like(other, dtype=torch.float64) / other)
    if op.needs[1]:
        op.scale(1, -self / (other * other))


@rule("DivBackward1", saved="other")
def div_number(op, other):
    op.scale(0, 1.0 / other)


@rule("AddcmulBackward0", saved="tensor1 tensor2 value")
def addcmul(op, tensor1, tensor2, value):
    if op.needs[0]:
        op.add(0)
    if op.needs[1]:
        op.scale(1, value * tensor2)
    if op.needs[2]:
        op.scale(2, value * tensor1)


def _power_derivative(x: torch.Tensor, exponent) -> torch.Tensor:
    # x ** 0 is constant at x = 0 too, where the general form would give 0 * inf.
    return torch.zeros_like(x) if exponent == 0 else exponent * x ** (exponent - 1)


@rule("PowBackward0", saved="exponent self")
def pow_number(op, exponent, x):
    op.scale(0, 2 * x if exponent == 2 else _power_derivative(x, exponent))


@rule("PowBackward1", saved="exponent result self")
def pow_tensor(op, exponent, result, x):
    if op.needs[0]:
        op.scale(0, torch.where(exponent == 0, 0.0, exponent * x ** (exponent - 1)).to(result.dtype))
    if op.needs[1]:
        op.scale(1, torch.where((x == 0) & (exponent >= 0), 0.0, result * torch.log(x)).to(result.dtype))


@rule("PowBackward2", saved="exponent result self")
def pow_base(op, exponent, result, base):
    base = torch.as_tensor(base, dtype=result.dtype)
    op.scale(0, torch.where((base == 0) & (exponent >= 0), 0.0, result * torch.log(base)).to(result.dtype))


@rule("WhereBackward0", saved="condition")
def where(op, condition):
    if op.needs[0]:
        op.scale(0, condition)
    if op.needs[1]:
        op.scale(1, ~condition)


@rule("MaximumBackward0", saved="other self")
def maximum(op, other, self):
    share = (self > other).to(self.dtype) + 0.5 * (self == other)
    if op.needs[0]:
        op.scale(0, share)
    if op.needs[1]:
        op.scale(1, 1 - share)


@rule("MinimumBackward0", saved="other self")
def minimum(op, other, self):
    share = (self < other).to(self.dtype) + 0.5 * (self == other)
    if op.needs[0]:
        op.scale(0, share)
    if op.needs[1]:
        op.scale(1, 1 - share)


# Double-backward nodes: what nested autograd.grad(..., create_graph=True) leaves on the tape.


@rule("TanhBackwardBackward0", saved="grad_output output")
def tanh_backward(op, grad, y):
    """f(g, y) = g (1 - y^2)."""
    if op.needs[0]:
        op.scale(0, y, function="1 - c^2")
    if op.needs[1]:
        op.scale(1, -2 * grad * y)


@rule("SigmoidBackwardBackward0", saved="grad_output output")
def sigmoid_backward(op, grad, y):
    """f(g, y) = g y (1 - y)."""
    if op.needs[0]:
        op.scale(0, y, function="c - c^2")
    if op.needs[1]:
        op.scale(1, grad * (1 - 2 * y))


@rule("ThresholdBackwardBackward0", saved="self threshold")
def threshold_backward(op, x, threshold):
    """f(g, x) = g [x > threshold]; piecewise constant in x."""
    if op.needs[0]:
        op.scale(0, (x > threshold).to(x.dtype))
    elif op.needs[1]:
        op.scale(1, 0.0)


@rule("LeakyReluBackwardBackward0", saved="negative_slope self")
def leaky_relu_backward(op, slope, x):
    """f(g, x) = g (1 or slope); piecewise constant in x."""
    if op.needs[0]:
        op.scale(0, _leaky(slope, x))
    elif op.needs[1]:
        op.scale(1, 0.0)


@rule("SoftplusBackwardBackward0", saved="beta grad_output self threshold")
def softplus_backward(op, beta, grad, x, threshold):
    """f(g, x) = g sigmoid(beta x), the identity above the threshold."""
    s = torch.sigmoid(x * beta)
    above = x * beta > threshold
    if op.needs[0]:
        op.scale(0, torch.where(above, 1.0, s).to(x.dtype))
    if op.needs[1]:
        op.scale(1, torch.where(above, 0.0, grad * beta * s * (1 - s)).to(x.dtype))


@rule("HardtanhBackwardBackward0", saved="max_val min_val self")
def hardtanh_backward(op, high, low, x):
    """f(g, x) = g [low < x < high]; piecewise constant in x."""
    if op.needs[0]:
        op.scale(0, ((x > low) & (x < high)).to(x.dtype))
    elif op.needs[1]:
        op.scale(1, 0.0)


@rule("GeluBackwardBackward0", saved="approximate grad_output self")
def gelu_backward(op, approximate, grad, x):
    """f(g, x) = g gelu'(x)."""
    if op.needs[0]:
        op.scale(0, _gelu_derivative(approximate, x))
    if op.needs[1]:
        op.scale(1, grad * _gelu_second_derivative(approximate, x))


def _gelu_second_derivative(approximate: str, x: torch.Tensor) -> torch.Tensor:
    if approximate == "none":   # gelu = x Phi(x), Phi' = phi, phi' = -x phi
        return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    k, a = math.sqrt(2 / math.pi), 0.044715   # gelu = x (1 + t) / 2, t = tanh(k (x + a x^3))
    t = torch.tanh(k * (x + a * x**3))
    inner, curve = k * (1 + 3 * a * x * x), 6 * k * a * x
    return (1 - t * t) * (inner + 0.5 * x * (curve - 2 * t * inner * inner))


@rule("EluBackwardBackward0", saved="alpha grad_output input_scale is_result scale self_or_result")
def elu_backward(op, alpha, grad, input_scale, is_result, scale, x):
    """f(g, x) = g elu'(x), or g elu'(elu^-1(x)) where the result was saved (in-place elu)."""
    a = alpha * scale
    slope = input_scale * (x + a if is_result else a * torch.exp(x * input_scale))
    if op.needs[0]:
        op.scale(0, torch.where(x > 0, float(scale), slope).to(x.dtype))
    if op.needs[1]:
        curve = grad * input_scale * (1 if is_result else slope)
        op.scale(1, torch.where(x > 0, 0.0, curve).to(x.dtype))


@rule("LogSigmoidBackwardBackward0", saved="grad_output self")
def log_sigmoid_backward(op, grad, x):
    """f(g, x) = g sigmoid(-x)."""
    s = torch.sigmoid(-x)
    if op.needs[0]:
        op.scale(0, s)
    if op.needs[1]:
        op.scale(1, grad * s * (s - 1))
