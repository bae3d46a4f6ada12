"""A network run on stacks: a tensor that carries its derivatives with respect to the network's inputs along.

`Stack` stands for a tensor (N,) or (N, width) whose rows belong to the points. PyTorch hands every operation on it to a rule
below, which computes value and derivatives; the network is any callable that is made of operations with rules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layer import layer, padded


class Unsupported(Exception):
    """An operation without a rule; carries its name."""


class Form:
    """Which channels a stack has: K first derivatives, and S second ones by their weights, (S, K)."""

    def __init__(self, directions: int, weights: tuple[tuple[float, ...], ...]):
        self.directions, self.weights = directions, weights
        self.channels = 1 + directions + len(weights)
        self._units: dict = {}

    def unit(self, like: torch.Tensor) -> torch.Tensor:
        """(C, 1, ...) with a one for the value: what turns a constant into a stack; `like` is a stack."""
        key = like.dtype, like.device, like.dim()
        if key not in self._units:
            unit = torch.zeros(self.channels, dtype=like.dtype, device=like.device)
            unit[0] = 1.0
            self._units[key] = unit.view(-1, *[1] * (like.dim() - 2))
        return self._units[key]


class Stack(torch.Tensor):
    """The tensor that a network sees: shape (N,) or (N, width), with all channels behind it.

    A product with a weight waits until it is known whether an activation follows: the core does both in one pass.
    """

    @staticmethod
    def __new__(cls, channels, form, waiting=None):
        source = channels if waiting is None else waiting[0]
        shape = (len(source), *source.shape[2:]) if waiting is None else (len(source), len(waiting[1]))
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=source.device)
        self.form, self._channels, self._waiting = form, channels, waiting
        return self

    @property
    def waiting(self):
        """(stack, weight, bias, scale) of a product that has not been computed yet, or None."""
        return self._waiting

    @property
    def given(self) -> torch.Tensor:
        """The channels, (N, C, ...); second derivatives that are zero may be missing."""
        if self._channels is None:
            stack, weight, bias, scale = self._waiting
            self._channels = layer(stack, weight, bias, self.form.weights, self.form.directions, "identity", 1.0)
            if scale != 1.0:
                self._channels = scale * self._channels
            self._waiting = None
        return self._channels

    @property
    def channels(self) -> torch.Tensor:
        """All channels, (N, C, ...)."""
        return padded(self.given, self.form.channels)

    def __repr__(self, **_):
        return f"Stack({tuple(self.shape)}, {self.form.channels} channels)"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        rule = _RULES.get(function)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise Unsupported(getattr(function, "__name__", str(function)))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise Unsupported(str(function))


_METADATA = {
    torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.ndim.__get__,
    torch.Tensor.requires_grad.__get__, torch.Tensor.is_leaf.__get__, torch.Tensor.layout.__get__, torch.Tensor.is_cuda.__get__,
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point,
    torch.is_floating_point, torch.numel,
}
_RULES: dict = {}


def _rule(*functions):
    """Register a rule for these functions of PyTorch."""

    def register(rule):
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _like(x: Stack, channels: torch.Tensor) -> Stack:
    return Stack(channels, x.form)


def _constant(c, like: torch.Tensor):
    """A constant to broadcast against a stack's channels; a number stays one."""
    if not isinstance(c, torch.Tensor):
        return c
    if c.dim() > like.dim() - 1:
        raise Unsupported("an operation with a constant of more dimensions")
    return c.unsqueeze(1) if c.dim() == like.dim() - 1 else c


@_rule(F.linear)
def _linear(input, weight, bias=None):
    if not isinstance(input, Stack) or input.dim() != 2 or isinstance(weight, Stack) or weight.dim() != 2:
        raise Unsupported("linear")
    if input.dtype is not weight.dtype or weight.shape[1] != input.shape[1]:
        raise Unsupported("linear of another dtype or size")   # the nested form gives PyTorch's own message
    return Stack(None, input.form, (input.given, weight, bias, 1.0))


@_rule(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
def _matmul(left, right):
    if isinstance(right, Stack) or right.dim() != 2:
        raise Unsupported("matmul")
    return _linear(left, right.T)


@_rule(torch.addmm)
def _addmm(bias, left, right, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1 or isinstance(bias, Stack) or bias.dim() != 1:
        raise Unsupported("addmm")
    return _linear(left, right.T, bias)


def _activate(kind: str, x: Stack) -> Stack:
    if x.waiting is not None:
        stack, weight, bias, scale = x.waiting
        return _like(x, layer(stack, weight, bias, x.form.weights, x.form.directions, kind, scale))
    given = x.given
    flat = given.flatten(2) if given.dim() > 2 else given.unsqueeze(2)
    eye = torch.eye(flat.shape[2], dtype=flat.dtype, device=flat.device)
    return _like(x, layer(flat, eye, None, x.form.weights, x.form.directions, kind, 1.0).view(len(x), -1, *given.shape[2:]))


def _elementwise(kind: str, *functions):
    @_rule(*functions)
    def apply(x):
        return _activate(kind, x)


_elementwise("tanh", torch.tanh, torch.Tensor.tanh, F.tanh)
_elementwise("sigmoid", torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid, torch.special.expit)
_elementwise("sin", torch.sin, torch.Tensor.sin)
_elementwise("cos", torch.cos, torch.Tensor.cos)
_elementwise("exp", torch.exp, torch.Tensor.exp)
_elementwise("square", torch.square, torch.Tensor.square)


def _inplace(kind: str, *functions):
    @_rule(*functions)
    def apply(input, inplace=False):
        if inplace:
            raise Unsupported(f"{kind} in place")
        return _activate(kind, input)


_inplace("relu", torch.relu, torch.Tensor.relu, F.relu)
_inplace("silu", F.silu)


@_rule(F.gelu)
def _gelu(input, approximate="none"):
    if approximate != "none":
        raise Unsupported(f"gelu with approximate={approximate!r}")
    return _activate("gelu", input)


@_rule(F.softplus)
def _softplus(input, beta=1.0, threshold=20.0):
    if beta != 1 or threshold != 20:
        raise Unsupported("softplus with beta or threshold")
    return _activate("softplus", input)


@_rule(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)
def _pow(x, exponent):
    if isinstance(exponent, torch.Tensor) or not isinstance(x, Stack) or exponent not in (1, 2, 3):
        raise Unsupported("pow")
    square = x if exponent == 1 else _activate("square", x)
    return _mul(square, x) if exponent == 3 else square


@_rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.multiply)
def _mul(a, b):
    if not isinstance(a, Stack):
        a, b = b, a
    if not isinstance(b, Stack):
        if a.waiting is not None and isinstance(b, (int, float)):
            stack, weight, bias, scale = a.waiting
            return Stack(None, a.form, (stack, weight, bias, scale * b))
        return _like(a, a.given * _constant(b, a.given))
    x, y, K = a.channels, b.channels, a.form.directions
    if x.dim() != y.dim():
        raise Unsupported("a product of tensors of different dimensions")
    u, v, du, dv = x[:, :1], y[:, :1], x[:, 1 : 1 + K], y[:, 1 : 1 + K]
    parts = [u * v, du * v + u * dv]
    if a.form.weights:
        cross = du * dv
        mixed = [
            sum(2.0 * w * cross[:, k : k + 1] for k, w in enumerate(row) if w != 0) for row in a.form.weights
        ]
        parts.append(x[:, 1 + K :] * v + u * y[:, 1 + K :] + torch.cat(mixed, 1))
    return _like(a, torch.cat(parts, 1))


@_rule(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.true_divide)
def _div(a, b):
    if isinstance(b, Stack):
        raise Unsupported("division by a function of the inputs")
    return _mul(a, 1.0 / b)


@_rule(torch.neg, torch.Tensor.neg, torch.Tensor.__neg__)
def _neg(a):
    return _mul(a, -1.0)


@_rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _add(a, b, *, alpha=1):
    if alpha != 1:
        b = b * alpha
    if not isinstance(a, Stack):
        a, b = b, a
    if isinstance(b, Stack):
        if a.dim() != b.dim():
            raise Unsupported("a sum of tensors of different dimensions")
        return _like(a, a.channels + b.channels)
    channels = a.channels
    return _like(a, channels + _constant(b, channels) * a.form.unit(channels))


@_rule(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
def _sub(a, b, *, alpha=1):
    return _add(a, b * -alpha)


@_rule(torch.rsub, torch.Tensor.__rsub__)
def _rsub(a, b):
    return _add(_mul(a, -1.0), b)


@_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors, dim=0):
    tensors = list(tensors)
    first = next(t for t in tensors if isinstance(t, Stack))
    if dim not in (1, -1) or first.dim() != 2:
        raise Unsupported("cat along another dimension than the last")
    if any(not isinstance(t, Stack) for t in tensors):
        raise Unsupported("cat with a constant")
    return _like(first, torch.cat([t.channels for t in tensors], -1))


@_rule(torch.Tensor.__getitem__)
def _getitem(x, at):
    at = at if isinstance(at, tuple) else (at,)
    whole = slice(None)
    if at[0] is Ellipsis:
        at = (whole, *at[1:]) if len(at) == x.dim() else at
    if not isinstance(at[0], slice) or at[0] != whole or any(isinstance(i, torch.Tensor) for i in at):
        raise Unsupported("indexing of points")
    result = x.given[(whole, whole, *at[1:])]
    if result.dim() not in (2, 3):
        raise Unsupported("indexing to more dimensions")
    return _like(x, result)


@_rule(torch.unsqueeze, torch.Tensor.unsqueeze)
def _unsqueeze(x, dim):
    if x.dim() != 1 or dim not in (1, -1):
        raise Unsupported("unsqueeze")
    return _like(x, x.given.unsqueeze(-1))


@_rule(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(x, dim=None):
    if dim not in (1, -1) or x.dim() != 2:
        raise Unsupported("squeeze")
    return _like(x, x.given.squeeze(-1))


@_rule(torch.unbind, torch.Tensor.unbind)
def _unbind(x, dim=0):
    if dim not in (1, -1) or x.dim() != 2:
        raise Unsupported("unbind of points")
    return tuple(_like(x, part) for part in x.given.unbind(-1))


@_rule(torch.chunk, torch.Tensor.chunk)
def _chunk(x, chunks, dim=0):
    if dim not in (1, -1) or x.dim() != 2:
        raise Unsupported("chunk of points")
    return tuple(_like(x, part) for part in x.given.chunk(chunks, -1))


@_rule(torch.split, torch.Tensor.split)
def _split(x, sizes, dim=0):
    if dim not in (1, -1) or x.dim() != 2:
        raise Unsupported("split of points")
    return tuple(_like(x, part) for part in x.given.split(sizes, -1))


@_rule(F.dropout)
def _dropout(input, p=0.5, training=True, inplace=False):
    if training and p > 0:
        raise Unsupported("dropout")
    return input


@_rule(torch.Tensor.clone, torch.Tensor.contiguous, torch.clone)
def _same(x, **_):
    return x

