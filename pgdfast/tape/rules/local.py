"""Operations that map small groups of elements to small groups, independently over all other dimensions.

The local Jacobians of all groups are found together, one call of the node's own backward per output element of a group.
"""

from __future__ import annotations

import math

import torch

from ..program import UnsupportedStructure
from .pointwise import coefficient
from .table import OwnBackward, reduced, rule, signed

MOST_BYTES = 64 << 20   # of the local Jacobians of one input
_WIDE = 256   # entries of a local Jacobian from which on a product of matrices is cheaper


def local(op, backward: OwnBackward, groups: dict, out: int = 0, out_dims=()):
    """Write output number `out`, whose dimensions `out_dims` belong to a group.

    groups: {number of an input: its dimensions, once broadcast, that belong to a group}. The other dimensions of inputs and
    output correspond in order.
    """
    shape = tuple(backward.outputs[out].shape)
    out_dims = [signed(d) % len(shape) for d in out_dims]
    batch = [d for d in range(len(shape)) if d not in out_dims]
    n = math.prod(shape[d] for d in out_dims)
    count = math.prod(shape[d] for d in batch)
    groups = {i: dims for i, dims in groups.items() if op.needs[i]}
    if n * count == 0:
        op.nothing(out)
        return
    rows: dict = {i: [] for i in groups}
    for unit in _units(backward.outputs[out], [*batch, *out_dims], count, n):
        gradients = backward(unit, out)
        for i in groups:
            g = gradients[i]
            if g is not None and g.numel() * n * g.element_size() > MOST_BYTES:
                raise UnsupportedStructure(f"local Jacobians of more than {MOST_BYTES >> 20} MB")
            rows[i].append(g)
    flat = f"flat {out}"
    op.temporary(flat, (count, n))
    for i, dims in groups.items():
        if any(g is None for g in rows[i]):   # no derivative; nothing is to be read but the structure stays
            continue
        full = rows[i][0].shape
        inner = [signed(d) % len(full) for d in dims]
        order = [d for d in range(len(full)) if d not in inner] + inner
        k = math.prod(full[d] for d in inner)
        jacobian = torch.stack([g.permute(order).reshape(count, k) for g in rows[i]], 2)
        op.view(i, lambda x, full=full, order=order: x.expand(full).permute(order), out=f"moved {i}")
        op.reshape(f"moved {i}", (count, k), out=f"groups {i}")
        apply_jacobian(op, f"groups {i}", jacobian, flat)
    inverse = [[*batch, *out_dims].index(d) for d in range(len(shape))]
    split = [shape[d] for d in [*batch, *out_dims]]
    op.view(flat, lambda y: y.view(split).permute(inverse), out=out)


def apply_jacobian(op, i, jacobian: torch.Tensor, out):
    """Out (B, n) += in_i (B, k) times Jacobians (B, k, n), or (k, n) for all of B."""
    if jacobian.dim() == 2:
        op.matmul(i, right=jacobian, out=out)
    elif jacobian.shape[0] == 1:
        op.matmul(i, right=jacobian[0], out=out)
    elif jacobian.shape[2] == 1:
        op.view(out, lambda y: y[:, 0], out=f"column {i} {out}")
        op.sum(i, (1,), False, c=jacobian[:, :, 0].contiguous(), out=f"column {i} {out}")
    elif math.prod(jacobian.shape[1:]) < _WIDE:
        op.view(i, lambda x: x.unsqueeze(2).expand(*x.shape, jacobian.shape[2]), out=f"wide {i} {out}")
        op.sum(f"wide {i} {out}", (1,), False, c=jacobian.contiguous(), out=out)
    else:
        op.view(i, lambda x: x.unsqueeze(1), out=f"row {i} {out}")
        op.view(out, lambda y: y.unsqueeze(1), out=f"row of {i} {out}")
        op.matmul(f"row {i} {out}", right=jacobian.contiguous(), out=f"row of {i} {out}")


def _units(like, order, count: int, n: int):
    """Gradients that are 1 at one element of every group, one after the other."""
    shape = tuple(like.shape)
    inverse = [order.index(d) for d in range(len(shape))]
    split = [shape[d] for d in order]
    for e in range(n):
        unit = torch.zeros(count, n, dtype=like.dtype, device=like.device)
        unit[:, e] = 1
        yield unit.view(split).permute(inverse)


# --- reductions: a group has one output -------------------------------------------------------------------------------------


@rule("ProdBackward1", saved="dim keepdim", own=True)
@rule("NormBackward1", "NormBackward3", "LinalgVectorNormBackward0", saved="dim keepdim", own=True)
@rule("NansumBackward0", "VarBackward0", "StdBackward0", saved="dim keepdim", own=True)
def reduce_dims(op, dims, keepdim, backward):
    _reduce(op, dims, keepdim, backward)


@rule("VarMeanBackward0", "StdMeanBackward0", "AminmaxBackward0", saved="dim keepdim", own=True, used=True)
def reduce_twice(op, dims, keepdim, backward, used):
    _reduce(op, dims, keepdim, backward, used)


def _reduce(op, dims, keepdim, backward, used=(0,)):
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    for out in used:
        gradient = backward(backward.ones(out), out)[0]
        if gradient is None:   # a norm of order 0
            op.nothing(out)
            continue
        if gradient.numel() == 1:   # the dimensions of a number may be anything
            shape = tuple(backward.outputs[out].shape)
            op.reshape(0, shape, out=f"number {out}")
            op.scale(f"number {out}", gradient.reshape(shape), out=out)
            continue
        op.sum(0, reduced(dims, gradient.dim()), keepdim, c=gradient.contiguous(), out=out)


WHOLE = """
    DistBackward0 MedianBackward0 NanmedianBackward0 NormBackward0 NormBackward2 ProdBackward0
"""
LOSSES = """
    BinaryCrossEntropyBackward0 BinaryCrossEntropyWithLogitsBackward0 HuberLossBackward0 MseLossBackward0 SmoothL1LossBackward0
    SoftMarginLossBackward0
"""


@rule(*WHOLE.split(), own=True)
def whole(op, backward):
    """One number from all elements."""
    for i, gradient in enumerate(backward(backward.ones())):
        if op.needs[i]:
            _to_a_number(op, i, gradient)


@rule(*LOSSES.split(), own=True)
def loss(op, backward):
    """Pointwise, or the sum or mean of such."""
    single = not backward.outputs[0].shape
    for i, gradient in enumerate(backward(backward.ones())):
        if op.needs[i]:
            if single:
                _to_a_number(op, i, gradient)
            else:
                op.scale(i, coefficient(gradient, backward))


@rule(*(name.replace("Backward0", "BackwardBackward0") for name in LOSSES.split() if "Logits" not in name), saved="reduction",
      own=True)
def loss_backward(op, reduction, backward):
    """f(g, x, ...) = g times the slope of a loss, pointwise where g is no single number."""
    if reduction and op.needs[0]:
        raise UnsupportedStructure("second derivatives of a loss that was reduced to a number")
    for i, gradient in enumerate(backward(backward.ones())):
        if op.needs[i]:
            op.scale(i, coefficient(gradient, backward))


def _to_a_number(op, i, gradient: torch.Tensor | None):
    if gradient is None:
        op.nothing()
        return
    op.view(i, lambda x: x.expand(gradient.shape), out=f"expanded {i}")
    op.sum(f"expanded {i}", None, False, c=gradient.contiguous())


@rule("NllLossBackward0", "NllLoss2DBackward0", "MultiMarginLossBackward0", "MultilabelMarginLossBackward0", own=True)
def loss_of_classes(op, backward):
    gradient = backward(backward.ones())[0]
    if backward.outputs[0].shape:
        op.sum(0, (1,), False, c=gradient.contiguous())
    else:
        _to_a_number(op, 0, gradient)


# --- along a dimension ------------------------------------------------------------------------------------------------------


@rule("CumprodBackward0", saved="dim", own=True)
def along(op, dim, backward):
    if backward.outputs[0].shape:
        local(op, backward, {0: [dim]}, out_dims=[dim])
    else:
        op.scale(0, backward(backward.ones())[0])


@rule("LinalgCrossBackward0", saved="dim", own=True)
def cross(op, dim, backward):
    local(op, backward, {0: [dim], 1: [dim]}, out_dims=[dim])


@rule("RenormBackward0", saved="dim", own=True)
def renorm(op, dim, backward):
    others = [d for d in range(len(backward.outputs[0].shape)) if d != signed(dim) % len(backward.outputs[0].shape)]
    local(op, backward, {0: others}, out_dims=others)


@rule("LogcumsumexpBackward0", saved="dim result self")
def logcumsumexp(op, dim, result, x):
    """D out_j / d x_i = exp(x_i - out_j) for i <= j; autograd's own backward takes logarithms of gradients."""
    if not x.dim():
        op.add(0)
        return
    dim = signed(dim) % x.dim()
    x, result = x.movedim(dim, -1), result.movedim(dim, -1)
    split, k, count = x.shape, x.shape[-1], math.prod(x.shape[:-1])
    if x.numel() * k * x.element_size() > MOST_BYTES:
        raise UnsupportedStructure(f"local Jacobians of more than {MOST_BYTES >> 20} MB")
    above = torch.ones(k, k, dtype=torch.bool, device=x.device).tril(-1)
    jacobian = (x.unsqueeze(-1) - result.unsqueeze(-2)).masked_fill(above, -math.inf).exp().reshape(count, k, k)
    op.view(0, lambda x: x.movedim(dim, -1), out="moved")
    op.reshape("moved", (count, k), out="groups")
    op.temporary("flat", (count, k))
    apply_jacobian(op, "groups", jacobian, "flat")
    op.view("flat", lambda y: y.view(split).movedim(-1, dim), out=0)


# --- derivatives of operations along a dimension, as nested autograd.grad leaves them on the tape ---------------------------


@rule("SoftmaxBackwardDataBackward0", saved="dim grad_output output")
def softmax_backward(op, dim, grad, y):
    """f(g, y) = y (g - <g, y>)."""
    dim = signed(dim) % max(y.dim(), 1)
    if op.needs[0]:
        op.project(0, (dim,), y, ((None, y),))
    if op.needs[1]:
        op.scale(1, grad - (grad * y).sum(dim, keepdim=True))
        op.temporary("inner", (grad * y).sum(dim, keepdim=True).shape)
        op.sum(1, (dim,), True, c=grad, alpha=-1, out="inner")
        op.scale("inner", y)


@rule("LogSoftmaxBackwardDataBackward0", saved="dim grad_output output")
def log_softmax_backward(op, dim, grad, log_p):
    """f(g, y) = g - exp(y) sum(g)."""
    dim, p = signed(dim) % max(log_p.dim(), 1), torch.exp(log_p)
    if op.needs[0]:
        op.project(0, (dim,), None, ((p, None),))
    if op.needs[1]:
        op.scale(1, -p * grad.sum(dim, keepdim=True))


@rule("GluBackwardBackward0", saved="dim grad_output self")
def glu_backward(op, dim, grad, x):
    """Of the halves a and b of x: g sigmoid(b) and g a sigmoid'(b)."""
    dim = signed(dim)
    a, b = x.chunk(2, dim)
    s = torch.sigmoid(b)
    t = s * (1 - s)

    def half(k):
        return lambda y: y.chunk(2, dim)[k]

    if op.needs[0]:
        op.scale(0, s, where=half(0))
        op.scale(0, a * t, where=half(1))
    if op.needs[1]:
        op.view(1, half(0), out="a")
        op.view(1, half(1), out="b")
        op.scale("b", grad * t, where=half(0))
        op.scale("a", grad * t, where=half(1))
        op.scale("b", grad * a * t * (1 - 2 * s), where=half(1))
