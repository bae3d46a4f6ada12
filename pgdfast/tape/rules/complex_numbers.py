"""Complex tensors between real ones: each is a pair of slots, of its real and its imaginary part.

Operations that act on both parts alike run their ordinary rule on each. Pointwise ones read four coefficients off the node's
own backward: PyTorch's gradient of a complex number is that by its real part plus i times that by its imaginary part.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..program import UnsupportedStructure
from . import elementwise, gathers, linear_maps, pointwise, probed, selection, structural, writes
from .local import MOST_BYTES
from .table import RULES, OwnBackward, Rule, plain, reduced, signed

RE, IM = "re", "im"
_REAL_FACTORS = (structural, gathers, selection, writes, probed, linear_maps)   # whose rules multiply by real numbers alone
_MIXING = ("GluBackward0",)   # not pointwise, though among those that are
_SUMS = (
    "AddBackward0", "SubBackward0", "RsubBackward0", "NegBackward0", "CloneBackward0", "AliasBackward0", "MaskedFillBackward0",
    "WhereBackward0",
)


def rule_for_complex(structure, position: int) -> Rule | None:
    """The rule of a node with complex inputs or outputs; None where there is none."""
    name = structure.kinds[position].removesuffix("_copy")
    inputs, outputs = structure.complex_at(position)
    if name in _OWN:
        apply, saved = _OWN[name]
        return _reading(apply, saved, inputs, outputs)
    used = structure.used(position)
    if name in _POINTWISE_ONLY:
        return _by_gradients(inputs, outputs, used)
    found = RULES.get(name)
    if found is None:
        return None
    active = [c for c, edge in zip(inputs, structure.edges[position], strict=True) if edge is not None]
    if all(active) and all(outputs) and (found.apply.__module__ in _MODULES or name in _SUMS):
        return _by_parts(found.of(structure, position))
    if found.apply.__module__ in (elementwise.__name__, pointwise.__name__) and name not in _MIXING:
        return _by_gradients(inputs, outputs, used)
    return None


def _by_gradients(inputs, outputs, used) -> Rule:
    return Rule(lambda op, backward: _pointwise(op, backward, inputs, outputs, used), (), lambda node: (OwnBackward(node),))


def _reading(apply, saved: str, inputs, outputs) -> Rule:
    names = tuple("_saved_" + name for name in saved.split())

    def read(node):
        like = node._input_metadata[0]
        return (*[plain(getattr(node, name)) for name in names], tuple(like.shape), like.device)

    return Rule(lambda op, *values: apply(op, inputs, outputs, *values), names, read)


def _by_parts(found: Rule) -> Rule:
    def apply(op, *values):
        if any(type(value) is complex for value in values):
            raise UnsupportedStructure("a complex factor")
        for part in (RE, IM):
            op.parts = part, part
            found.apply(op, *values)

    return dataclasses.replace(found, apply=apply, specialize=None)


def _pointwise(op, backward: OwnBackward, inputs, outputs, used):
    for out in used:
        for unit, to in ((1, RE), (1j, IM)) if outputs[out] else ((1, None),):
            gradients = backward(backward.ones(out) * unit, out)
            for i, needed in enumerate(op.needs):
                if not needed:
                    continue
                c = pointwise.coefficient(gradients[i], backward, out)
                for part in (RE, IM) if inputs[i] else (None,):
                    op.parts = part, to
                    op.scale(i, _part_of(c, part), out=out)


def _part_of(c: torch.Tensor, part: str | None) -> torch.Tensor:
    """The real or the imaginary part of a tensor that may be real, with memory of its own."""
    if part == IM:
        return c.imag.contiguous() if c.is_complex() else torch.zeros_like(c)
    return c.real.contiguous()


# --- between complex and real -----------------------------------------------------------------------------------------------


def _view_as_real(op, inputs, outputs, shape, device):
    for k, part in enumerate((RE, IM)):
        op.parts = part, None
        op.add(0, where=lambda y, k=k: y.select(-1, k))


def _view_as_complex(op, inputs, outputs, shape, device):
    for k, part in enumerate((RE, IM)):
        op.parts = None, part
        op.view(0, lambda x, k=k: x.select(-1, k))


def _conj(op, inputs, outputs, shape, device):
    op.parts = RE, RE
    op.view(0, lambda x: x)
    op.parts = IM, IM
    op.add(0, -1)


def _convert(op, inputs, outputs, shape, device):
    if inputs[0] and outputs[0]:
        for part in (RE, IM):
            op.parts = part, part
            op.view(0, lambda x: x)
    elif outputs[0]:
        op.parts = None, RE
        op.view(0, lambda x: x)
        op.parts = None, IM
        op.nothing()
    else:
        op.parts = RE, None
        op.view(0, lambda x: x)


# --- products: linear in each factor ----------------------------------------------------------------------------------------


def _factor(op, i, c: torch.Tensor, verb, conjugate: bool = False):
    """verb(op, i, real matrix, sign) for the four products of parts of in_i, or of its conjugate, with those of a constant."""
    for part, to, of, sign in ((RE, RE, RE, 1), (IM, RE, IM, -1), (RE, IM, IM, 1), (IM, IM, RE, 1)):
        op.parts = part, to
        verb(op, i, _part_of(c, of), -sign if conjugate and part == IM else sign)


def _product(op, inputs, outputs, right, left, shape, device):
    if op.needs[0]:
        _factor(op, 0, right, lambda op, i, c, sign: op.matmul(i, right=c, alpha=sign))
    if op.needs[1]:
        _factor(op, 1, left, lambda op, i, c, sign: op.matmul(i, left=c, alpha=sign))


def _sum_and_product(op, inputs, outputs, left, right, alpha, beta, shape, device):
    if type(alpha) is complex or type(beta) is complex:
        raise UnsupportedStructure("a complex factor")
    if op.needs[1]:
        _factor(op, 1, right, lambda op, i, c, sign: op.matmul(i, right=c, alpha=sign * alpha))
    if op.needs[2]:
        _factor(op, 2, left, lambda op, i, c, sign: op.matmul(i, left=c, alpha=sign * alpha))
    if op.needs[0]:
        for part in (RE, IM):
            op.parts = part, part
            op.add(0, beta)


def _matrix_vector(op, inputs, outputs, matrix, vector, shape, device):
    if op.needs[0]:
        _factor(op, 0, vector, lambda op, i, c, sign: op.sum(i, (1,), False, c=c, alpha=sign))
    if op.needs[1]:
        _factor(op, 1, matrix, lambda op, i, c, sign: op.matmul(i, left=c, alpha=sign))


def _dot(op, inputs, outputs, left, right, shape, device):
    for i, c in ((0, right), (1, left)):
        if op.needs[i]:
            _factor(op, i, c, lambda op, i, c, sign: op.sum(i, (0,), False, c=c, alpha=sign))


def _vdot(op, inputs, outputs, left, right, shape, device):
    """Sum of conj(x) y."""
    if op.needs[0]:
        _factor(op, 0, right, lambda op, i, c, sign: op.sum(i, (0,), False, c=c, alpha=sign), conjugate=True)
    if op.needs[1]:
        _factor(op, 1, left.conj().resolve_conj(), lambda op, i, c, sign: op.sum(i, (0,), False, c=c, alpha=sign))


def _norm(op, inputs, outputs, dims, keepdim, result, z, order, shape, device):
    if order != 2:
        raise UnsupportedStructure(f"complex numbers in a norm of order {order}")
    dims = reduced(dims or (), z.dim())
    for d in () if keepdim else dims:
        result = result.unsqueeze(d)
    slope = torch.where(result == 0, 0.0, z / result)
    for part in (RE, IM):
        op.parts = part, None
        op.sum(0, dims, keepdim, c=_part_of(slope, part))


# --- Fourier transforms: a matrix per dimension -----------------------------------------------------------------------------


def _transform(op, inputs: dict, shape, dim: int, blocks: dict, name: str) -> tuple[dict, tuple]:
    """Along a dimension, outputs {part: name} and their shape from inputs {part: name} by blocks {(from, to): matrix}."""
    others = [size for d, size in enumerate(shape) if d != dim]
    count, n = math.prod(others), next(iter(blocks.values())).shape[1]
    results = {}
    for part, x in inputs.items():
        op.view(x, lambda x: x.movedim(dim, -1), out=f"{name} moved {part}")
        op.reshape(f"{name} moved {part}", (count, shape[dim]), out=f"{name} rows {part}")
    for (part, to), matrix in blocks.items():
        if to not in results:
            op.temporary(f"{name} flat {to}", (count, n))
            results[to] = f"{name} {to}"
        op.matmul(f"{name} rows {part}", right=matrix, out=f"{name} flat {to}")
    for to, result in results.items():
        op.view(f"{name} flat {to}", lambda y: y.view(*others, n).movedim(-1, dim), out=result)
    return results, (*shape[:dim], n, *shape[dim + 1 :])


def _blocks(matrix: torch.Tensor) -> dict:
    """Of a complex matrix."""
    re, im = matrix.real.contiguous(), matrix.imag.contiguous()
    return {(RE, RE): re, (IM, RE): -im, (RE, IM): im, (IM, IM): re}


def _unit(n: int, device) -> torch.Tensor:
    if n * n * 16 > MOST_BYTES:
        raise UnsupportedStructure(f"a Fourier transform of {n} points")
    return torch.eye(n, dtype=torch.float64, device=device)


def _c2c(n, normalization, forward, device) -> dict:
    return _blocks(torch._fft_c2c(_unit(n, device).to(torch.complex128), [1], normalization, forward))


def _named(op, i, is_complex: bool) -> dict:
    """Names of an input's parts."""
    names = {}
    for part in (RE, IM) if is_complex else (None,):
        op.parts = part, None
        op.view(i, lambda x: x, out=f"in {part or RE}")
        names[part or RE] = f"in {part or RE}"
    return names


def _finish(op, names: dict, outputs):
    for part, name in names.items():
        op.parts = None, part if outputs[0] else None
        op.view(name, lambda y: y, out=0)


def _fft(op, inputs, outputs, dims, forward, normalization, shape, device):
    names = _named(op, 0, True)
    for k, d in enumerate(dims):
        d = signed(d) % len(shape)
        names, shape = _transform(op, names, shape, d, _c2c(shape[d], normalization, forward, device), f"{k}")
    _finish(op, names, outputs)


def _fft_of_real(op, inputs, outputs, dims, normalization, onesided, x, shape, device):
    *others, last = [signed(d) % x.dim() for d in dims]
    names, shape = _named(op, 0, False), tuple(x.shape)
    matrix = torch._fft_r2c(_unit(shape[last], device), [1], normalization, onesided)
    names, shape = _transform(
        op, names, shape, last, {(RE, RE): matrix.real.contiguous(), (RE, IM): matrix.imag.contiguous()}, "last")
    for k, d in enumerate(others):
        names, shape = _transform(op, names, shape, d, _c2c(shape[d], normalization, True, device), f"{k}")
    _finish(op, names, outputs)


def _fft_to_real(op, inputs, outputs, dims, normalization, shape, device):
    *others, last = [signed(d) % len(shape) for d in dims]
    names, size = _named(op, 0, True), shape[last]
    shape = (*shape[:last], size // 2 + 1, *shape[last + 1 :])
    for k, d in enumerate(others):
        names, shape = _transform(op, names, shape, d, _c2c(shape[d], normalization, False, device), f"{k}")
    unit = _unit(size // 2 + 1, device).to(torch.complex128)
    blocks = {(part, RE): torch._fft_c2r(factor * unit, [1], normalization, size) for part, factor in ((RE, 1), (IM, 1j))}
    names, shape = _transform(op, names, shape, last, blocks, "last")
    _finish(op, names, outputs)


_MODULES = {module.__name__ for module in _REAL_FACTORS}
_OWN = {   # (function(op, which inputs are complex, which outputs, *saved, shape, device), saved)
    "ViewAsRealBackward0": (_view_as_real, ""),
    "ViewAsComplexBackward0": (_view_as_complex, ""),
    "ConjBackward0": (_conj, ""),
    "ToCopyBackward0": (_convert, ""),
    "MmBackward0": (_product, "mat2 self"),
    "BmmBackward0": (_product, "mat2 self"),
    "AddmmBackward0": (_sum_and_product, "mat1 mat2 alpha beta"),
    "BaddbmmBackward0": (_sum_and_product, "batch1 batch2 alpha beta"),
    "MvBackward0": (_matrix_vector, "self vec"),
    "DotBackward0": (_dot, "self tensor"),
    "VdotBackward0": (_vdot, "self other"),
    "LinalgVectorNormBackward0": (_norm, "dim keepdim result self ord"),
    "FftC2CBackward0": (_fft, "dim forward normalization"),
    "FftR2CBackward0": (_fft_of_real, "dim normalization onesided self"),
    "FftC2RBackward0": (_fft_to_real, "dim normalization"),
}
_POINTWISE_ONLY = ("ComplexBackward0", "PolarBackward0", "ConjPhysicalBackward0")   # of no use between real tensors
NODES = frozenset((*_OWN, *_POINTWISE_ONLY))   # that have rules for complex numbers of their own
