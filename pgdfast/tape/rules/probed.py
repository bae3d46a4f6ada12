"""Operations whose places no saved field tells: views in place, and strides on a storage that is gone.

Their own backward is asked, with the numbers of the elements for a gradient; what it answers belongs to the structure.
"""

from __future__ import annotations

import hashlib
import math

import torch

from ..program import UnsupportedStructure
from .selection import merged
from .table import RULES, Keyed, OwnBackward, Rule

_WINDOWS_KEPT, _LARGEST_KEPT = 256, 1 << 16
_BASE = 1 << 11   # numbers are sent digit by digit, which float32 holds exactly behind a weight


def _digits(count: int):
    """Powers of the base that numbers up to a count have."""
    scale = 1
    while scale <= count:
        yield scale
        scale *= _BASE


def _digest(*tensors) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for t in tensors:
        state.update(repr(tuple(t.shape)).encode())
        state.update(t.cpu().contiguous().numpy())
    return state.digest()


# --- an operation in place on a view of a tensor: (the tensor, what else the operation read); blocks of a matrix ------------


class _Window:
    """Where the elements of one input go in the output: input e times a weight to offset + sum of strides times e's indices."""

    __slots__ = ("key", "offset", "sizes", "strides", "weights")

    def __init__(self, weights, strides, offset):
        self.weights, self.strides, self.offset = weights, tuple(strides), offset
        self.sizes = tuple(weights.shape)
        self.key = self.sizes, self.strides, offset


def _window(weights: torch.Tensor, places: torch.Tensor, like) -> _Window:
    """The window that the places of the elements with a weight form."""
    shape, known = tuple(like.shape), (weights != 0).reshape(-1)
    count, at = math.prod(shape), places.reshape(-1)[known]
    whole = torch.arange(count, device=weights.device)
    contiguous = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    if tuple(weights.shape) == shape and torch.equal(at, whole[known]):
        return _Window(weights, contiguous, 0)
    if not len(at):
        return _Window(weights, [0] * weights.dim(), 0)
    key = tuple(weights.shape), shape, weights.device, int(at[0]), int(at[-1])
    found = _windows.get(key)
    if found is None or not torch.equal(found[2][known], at):
        found = _fit(tuple(weights.shape), at, known, count)
        if len(_windows) >= _WINDOWS_KEPT:
            _windows.clear()
        if weights.numel() <= _LARGEST_KEPT:
            _windows[key] = found
    return _Window(weights, *found[:2])


_windows: dict = {}   # (strides, offset, places) of windows seen before


def _fit(sizes, at: torch.Tensor, known: torch.Tensor, count: int):
    """(strides, offset, places of all elements): of offset + sum of strides times indices each known element is an equation."""
    index, size = torch.ones(math.prod(sizes), 1 + len(sizes), dtype=torch.float64, device=at.device), math.prod(sizes)
    numbers = torch.arange(size, device=at.device)
    for d, n in enumerate(sizes):
        size //= n
        index[:, 1 + d] = numbers // size % n
    offset, *strides = (
        int(s) for s in torch.linalg.lstsq(index[known], at.double()[:, None], driver="gelsd").solution[:, 0].round().tolist())
    last = offset + sum(s * (n - 1) for s, n in zip(strides, sizes, strict=True))
    places = (index @ index.new_tensor([offset, *strides])).to(torch.int64)
    if offset < 0 or min(strides, default=0) < 0 or last >= count or not torch.equal(places[known], at):
        raise UnsupportedStructure("an operation in place on a view that is no strided window")
    return strides, offset, places


def _column(node, i: int, backward: OwnBackward) -> _Window:
    """The same of an input with one element, which may go to all places: the derivative of its gradient."""
    like = backward.outputs[0]
    with torch.enable_grad():
        sent = backward.ones().requires_grad_()
        back = node(sent)[i].sum()
        column, = torch.autograd.grad(back.real if back.is_complex() else back, sent)
    column, = _real([column])
    return _Window(column.contiguous(), [math.prod(like.shape[d + 1 :]) for d in range(len(like.shape))], 0)


def _real(gradients: list) -> list:
    """Gradients, those that are complex as the real numbers that they are."""
    if any(g is not None and g.is_complex() and bool((g.imag != 0).any()) for g in gradients):
        raise UnsupportedStructure("an operation in place on a view of complex numbers that mixes their parts")
    return [g.real if g is not None and g.is_complex() else g for g in gradients]


def _read_in_place(node):
    backward = OwnBackward(node)
    like = backward.outputs[0]
    shape, count = tuple(like.shape), math.prod(like.shape)
    numbers = torch.arange(count, device=like.device).view(shape)
    real = like.dtype.to_real()
    probe = torch.rand(shape, dtype=real, device=like.device, generator=torch.Generator(like.device).manual_seed(0)) + 0.5
    if like.dtype.is_complex:
        probe = probe.to(like.dtype)
    weights, checked = _real(backward(backward.ones())), _real(backward(probe))
    if like.dtype.is_complex:
        turned = _real([None if g is None else -1j * g for g in backward(1j * backward.ones())])
        if any(not torch.equal(a, b) for a, b in zip(weights, turned, strict=True) if a is not None):
            raise UnsupportedStructure("an operation in place on a view of complex numbers that mixes their parts")
    probe = probe.real
    places: list = [0] * len(weights)
    for scale in _digits(count):
        sent = _real(backward((numbers // scale % _BASE).to(like.dtype)))
        for i, w in enumerate(weights):
            if w is not None:
                digit = torch.where(w == 0, 0.0, sent[i] / w).round().to(torch.int64)
                places[i] = places[i] + scale * digit
    windows = []
    for w, at, result in zip(weights, places, checked, strict=True):
        if w is None:
            windows.append(None)
            continue
        if w.numel() == 1 and count > 1:
            windows.append(_column(node, len(windows), backward))
            continue
        expected = w * probe.reshape(-1)[at.clamp(0, max(count - 1, 0)).reshape(-1)].view(w.shape)
        if not torch.allclose(result, expected, rtol=1e-4 if real == torch.float32 else 1e-10, atol=0.0):
            raise UnsupportedStructure("an operation in place on a view that mixes elements")
        windows.append(_window(w.contiguous(), at, like))
    return (Keyed(windows, tuple(None if w is None else w.key for w in windows)),)


def _in_place(op, found):
    for i, w in enumerate(found.value):
        if op.needs[i] and w is not None:
            op.view(i, lambda x, w=w: x.expand(w.sizes), out=f"expanded{i}")
            op.scale(f"expanded{i}", w.weights, where=lambda y, w=w: y.as_strided(w.sizes, w.strides, w.offset))


for _name in ("CopySlices", "BlockDiagBackward0"):
    RULES[_name] = Rule(_in_place, (), _read_in_place)


# --- strides on a storage ---------------------------------------------------------------------------------------------------


def _read_strided(node):
    """The positions by the derivative of the node's backward S^T: S applied to the numbers of the input's elements."""
    like = node._input_metadata[0]
    with torch.enable_grad():
        sent = torch.zeros(tuple(like.shape), dtype=torch.float64, device=like.device, requires_grad=True)
        back = node(sent)
        back = back[0] if isinstance(back, tuple) else back
        numbers = torch.arange(1, back.numel() + 1, dtype=torch.float64, device=like.device).view(back.shape)
        picked, = torch.autograd.grad(back, sent, numbers)
    rows, trailing = merged(picked.to(torch.int64) - 1, back.shape)
    return (Keyed(rows, (trailing, _digest(rows))),)


def _strided(op, found):
    op.gather(0, found.value, -found.key[0] or None, fixed=True)


RULES["AsStridedBackward0"] = Rule(_strided, (), _read_strided)
