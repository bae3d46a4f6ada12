"""A network run on stacks: a tensor that carries its derivatives with respect to the network's inputs along.

`Stack` stands for a tensor (N,) or (N, width) whose rows belong to the points. PyTorch hands every operation on it to a rule
below, which computes value and derivatives; the network is any callable that is made of operations with rules.
"""

from __future__ import annotations

import inspect
import itertools

import torch
import torch.nn.functional as F

from .chain import Layer, chain, padded, spread


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

    Layers wait until somebody needs the channels: the core takes a chain of them in one call.
    """

    @staticmethod
    def __new__(cls, shape, form, like, channels=None, seed=None, parent=None, layer=None):
        """See the class; like: any tensor of the network's dtype and device."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self.form, self.like = form, like
        self.sizes = shape   # the same as `shape`, without the way through __torch_function__
        self.seed = seed     # of the inputs: (x, along), derivatives that all points share
        self.parent, self.layer, self.users = parent, layer, 0
        self._channels = channels
        return self

    def then(self, layer: Layer) -> Stack:
        """The stack behind a layer."""
        self.users += 1
        return Stack((self.sizes[0], layer.weight.shape[0]), self.form, self.like, parent=self, layer=layer)

    @property
    def waits(self) -> bool:
        """Whether the last layer has not been computed yet."""
        return self._channels is None and self.layer is not None

    @property
    def given(self) -> torch.Tensor:
        """The channels, (N, C, ...); second derivatives that are zero may be missing."""
        if self.waits:
            layers, at = [self.layer], self.parent
            while at.waits and at.users < 2:   # what two read is computed for itself
                layers.append(at.layer)
                at = at.parent
            source = at.seed if at._channels is None and at.seed is not None else (at.given, None)
            scale = 1.0
            if self.layer.activation == "identity":   # one that was not followed by an activation
                layers[0], scale = self.layer._replace(scale=1.0), self.layer.scale
            channels = chain(*source, self.form.weights, self.form.directions, layers[::-1])
            self._channels = channels if scale == 1.0 else scale * channels
        elif self._channels is None:
            self._channels = spread(*self.seed)
        return self._channels

    @property
    def channels(self) -> torch.Tensor:
        """All channels, (N, C, ...)."""
        return padded(self.given, self.form.channels)

    @property
    def depth(self) -> int:
        """How many layers wait."""
        return 1 + self.parent.depth if self.waits else 0

    def __repr__(self, **_):
        return f"Stack({tuple(self.shape)}, {self.form.channels} channels)"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        rule, takes = _RULES.get(function, (None, ()))
        if rule is not None and (not kwargs or takes >= kwargs.keys()):
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
_RULES: dict = {}   # {function: (rule, names of its arguments)}


def _rule(*functions):
    """Register a rule for these functions of PyTorch."""

    def register(rule):
        takes = frozenset(inspect.signature(rule).parameters)
        _RULES.update(dict.fromkeys(functions, (rule, takes)))
        return rule

    return register


def _like(x: Stack, channels: torch.Tensor) -> Stack:
    points, _, *rest = channels.shape
    return Stack((points, *rest), x.form, x.like, channels)


def _open(x: Stack) -> bool:
    """Whether a scale and an activation may still join the product that x is."""
    return x.waits and x.users == 0 and x.layer.activation == "identity"


def _compute(*stacks: Stack) -> None:
    """Compute the channels of all, those first that others may be computed from."""
    for stack in sorted(stacks, key=lambda stack: stack.depth):
        stack.given  # noqa: B018


def _constant(c, like: torch.Tensor):
    """A constant to broadcast against a stack's channels; a number stays one."""
    if not isinstance(c, torch.Tensor):
        return c
    if c.dim() > like.dim() - 1:
        raise Unsupported("an operation with a constant of more dimensions")
    return c.unsqueeze(1) if c.dim() == like.dim() - 1 else c


@_rule(F.linear)
def _linear(input, weight, bias=None):
    if not isinstance(input, Stack) or len(input.sizes) != 2 or isinstance(weight, Stack) or weight.dim() != 2:
        raise Unsupported("linear")
    if input.like.dtype is not weight.dtype or weight.shape[1] != input.sizes[1]:
        raise Unsupported("linear of another dtype or size")   # the nested form gives PyTorch's own message
    if input.waits and input.layer.activation == "identity" and input.layer.scale != 1.0:
        input.given  # noqa: B018
    return input.then(Layer(weight, bias))


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
    if _open(x):
        x.parent.users -= 1
        return x.parent.then(x.layer._replace(activation=kind))
    given = x.given
    flat = given if given.dim() == 3 else given.unsqueeze(2)
    eye = torch.eye(flat.shape[2], dtype=flat.dtype, device=flat.device)
    y = chain(flat, None, x.form.weights, x.form.directions, [Layer(eye, None, kind)])
    return _like(x, y if given.dim() == 3 else y.squeeze(2))


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
        if isinstance(b, (int, float)) and _open(a):
            a.parent.users -= 1
            return a.parent.then(a.layer._replace(scale=a.layer.scale * b))
        return _like(a, a.given * _constant(b, a.given))
    _compute(a, b)
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
        if len(a.sizes) != len(b.sizes):
            raise Unsupported("a sum of tensors of different dimensions")
        _compute(a, b)
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
    if dim not in (1, -1) or len(first.sizes) != 2:
        raise Unsupported("cat along another dimension than the last")
    _compute(*[t for t in tensors if isinstance(t, Stack)])
    unit = first.form.unit(first.channels)
    parts = [t.channels if isinstance(t, Stack) else _constant(t, first.channels) * unit for t in tensors]
    # Neighbours that no parameter reaches as one: LM's tape can place one such piece.
    joined = [torch.cat(list(group), -1) for _, group in itertools.groupby(parts, lambda part: part.requires_grad)]
    return _like(first, torch.cat(joined, -1))


@_rule(torch.hstack)
def _hstack(tensors):
    return _cat(tensors, 1)


def _filled(function):
    @_rule(function)
    def apply(input):
        return function(torch.empty(input.sizes, dtype=input.like.dtype, device=input.like.device))


_filled(torch.zeros_like)
_filled(torch.ones_like)


@_rule(torch.Tensor.__getitem__)
def _getitem(x, at):
    at = at if isinstance(at, tuple) else (at,)
    whole = slice(None)
    if at[0] is Ellipsis:
        at = (whole, *at[1:]) if len(at) == len(x.sizes) else at
    if not isinstance(at[0], slice) or at[0] != whole or any(isinstance(i, torch.Tensor) for i in at):
        raise Unsupported("indexing of points")
    result = x.given[(whole, whole, *at[1:])]
    if result.dim() not in (2, 3):
        raise Unsupported("indexing to more dimensions")
    return _like(x, result)


@_rule(torch.unsqueeze, torch.Tensor.unsqueeze)
def _unsqueeze(x, dim):
    if len(x.sizes) != 1 or dim not in (1, -1):
        raise Unsupported("unsqueeze")
    return _like(x, x.given.unsqueeze(-1))


@_rule(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(x, dim=None):
    if dim not in (1, -1) or len(x.sizes) != 2:
        raise Unsupported("squeeze")
    return _like(x, x.given.squeeze(-1))


@_rule(torch.unbind, torch.Tensor.unbind)
def _unbind(x, dim=0):
    if dim not in (1, -1) or len(x.sizes) != 2:
        raise Unsupported("unbind of points")
    return tuple(_like(x, part) for part in x.given.unbind(-1))


@_rule(torch.chunk, torch.Tensor.chunk)
def _chunk(x, chunks, dim=0):
    if dim not in (1, -1) or len(x.sizes) != 2:
        raise Unsupported("chunk of points")
    return tuple(_like(x, part) for part in x.given.chunk(chunks, -1))


@_rule(torch.split, torch.Tensor.split)
def _split(x, sizes, dim=0):
    if dim not in (1, -1) or len(x.sizes) != 2:
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

