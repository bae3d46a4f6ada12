"""A torch.autograd.Function as one node, by its own backward.

Its local Jacobian is assembled from the backward of basis cotangents. Where output and input are aligned in some dimensions
(row n of the output depends on row n of the input alone, say), one call with ones along those serves all of their elements.
Which ones are is found out by trial, and checked with a random cotangent at every step.

Index legend: d elements of the aligned dimensions, s of the output's others, which are probed one by one, r of the input's.
"""

from __future__ import annotations

import itertools
import math

import torch

from ..program import UnsupportedStructure
from .table import Keyed, Rule, plain

_MOST_CALLS = 256      # of the backward, at a step
_MOST_PATTERNS = 256   # remembered
_TOLERANCE = {torch.float64: 1e-8}
_COARSE = 1e-4         # in any other precision
_patterns: dict[tuple, _Pattern | _TooDense] = {}


class _Backward:
    """A Function's backward as a plain call.

    outputs: numbers of those that have cotangents. inputs: of those that may have; shapes: theirs.
    """

    def __init__(self, node):
        self._node, self._metadata, self.name = node, node._input_metadata, node.name()
        self.outputs = [k for k, m in enumerate(self._metadata) if m.dtype.is_floating_point]
        self.inputs = [i for i, (child, _) in enumerate(node.next_functions) if child is not None]
        children = [node.next_functions[i] for i in self.inputs]
        self.shapes = [tuple(child._input_metadata[number].shape) for child, number in children]
        self._places = [k for k, needed in enumerate(node.needs_input_grad) if needed]
        if len(self._places) != len(self.inputs):
            raise UnsupportedStructure(f"{self.name}, whose inputs cannot be told apart")
        self.key = type(node), tuple([self.shape(k) for k in range(len(self._metadata))]), *self.inputs, *self.shapes

    def shape(self, k: int) -> tuple[int, ...]:
        """Of output k."""
        return tuple(self._metadata[k].shape)

    def zeros(self, k: int) -> torch.Tensor:
        """A cotangent of output k."""
        return torch.zeros(self.shape(k), dtype=self._metadata[k].dtype, device=self._metadata[k].device)

    def __call__(self, k: int, cotangent: torch.Tensor) -> list:
        """The cotangents of the inputs, None for zero, from that of output k."""
        given = [self.zeros(j) for j in range(len(self._metadata))]
        given[k] = cotangent
        with torch.no_grad():
            found = self._node.apply(*given)
        found = found if isinstance(found, tuple) else (found,)
        return [
            None if found[place] is None else plain(found[place].detach()).sum_to_size(shape)
            for place, shape in zip(self._places, self.shapes, strict=True)
        ]


class _Alignment:
    """Dimensions of an output, and those of an input that go with them; `others` and `rest`: what remains of both."""

    def __init__(self, shape: tuple, source: tuple, aligned: tuple, partners: tuple):
        self.shape, self.source, self.aligned, self.partners = shape, source, aligned, partners
        self.others = tuple(d for d in range(len(shape)) if d not in aligned)
        self.rest = tuple(d for d in range(len(source)) if d not in partners)
        self.sizes = tuple(shape[d] for d in aligned)
        self.calls = math.prod(shape[d] for d in self.others)
        self.key = aligned, partners

    def pulled(self, rows: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        """J^T u from the rows, (s, *input)."""
        u = cotangent.permute((*self.others, *self.aligned)).reshape(self.calls, *self.sizes)
        for d in self.rest:
            u = u.unsqueeze(1 + d)
        return (rows * u).sum(0)

    def blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows as (d, r, s)."""
        moved = rows.permute((*(1 + d for d in (*self.partners, *self.rest)), 0))
        return moved.reshape(math.prod(self.sizes), -1, self.calls)


def _alignments(shape: tuple, source: tuple) -> list[_Alignment]:
    """All there are, the one with the fewest calls first."""
    wide = [d for d, n in enumerate(shape) if n > 1]
    found = []
    for count in range(len(wide) + 1):
        for aligned in itertools.permutations(wide, count):
            for partners in itertools.combinations(range(len(source)), count):
                if all(shape[a] == source[b] for a, b in zip(aligned, partners, strict=True)):
                    found.append(_Alignment(shape, source, aligned, partners))
    return sorted((a for a in found if a.calls <= _MOST_CALLS), key=lambda a: a.calls)


class _Probes:
    """Calls of a backward at one point, each made once."""

    def __init__(self, backward: _Backward, cotangents: dict):
        self.backward, self.cotangents, self._rows, self._checks = backward, cotangents, {}, {}

    def rows(self, k: int, others: tuple) -> list:
        """Per input the cotangents (s, *input) of ones along all but the other dimensions of output k; None for zero."""
        if (k, others) not in self._rows:
            shape, calls = self.backward.shape(k), []
            for index in itertools.product(*(range(shape[d]) for d in others)):
                places = dict(zip(others, index, strict=True))
                u = self.backward.zeros(k)
                u[tuple([places.get(d, slice(None)) for d in range(len(shape))])] = 1
                calls.append(self.backward(k, u))
            self._rows[k, others] = [_stacked(parts) for parts in zip(*calls, strict=True)]
        return self._rows[k, others]

    def checks(self, k: int) -> list:
        """The cotangents of the inputs from a random one of output k."""
        if k not in self._checks:
            self._checks[k] = self.backward(k, self.cotangents[k])
        return self._checks[k]

    def agrees(self, k: int, i: int, alignment: _Alignment | None) -> bool:
        """Say whether output k depends on input i so; None: not at all."""
        expected = self.checks(k)[i]
        if alignment is None:
            return expected is None or not expected.any()
        rows = self.rows(k, alignment.others)[i]
        if rows is None or expected is None:
            return False
        found = alignment.pulled(rows, self.cotangents[k])
        tolerance = _TOLERANCE.get(expected.dtype, _COARSE)
        return bool((found - expected).norm() <= tolerance * expected.norm())   # False for NaN


def _stacked(parts: tuple) -> torch.Tensor | None:
    like = next((part for part in parts if part is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if part is None else part for part in parts])


class _TooDense(UnsupportedStructure):
    """A Function that takes too many calls."""


class _Pattern:
    """The alignment of every pair (output, input), None where there is no dependence; the random cotangents."""

    def __init__(self, probes: _Probes):
        backward = probes.backward
        self.cotangents, self.pairs = probes.cotangents, {}
        for k in backward.outputs:
            for i, source in enumerate(backward.shapes):
                if probes.agrees(k, i, None):
                    self.pairs[k, i] = None
                    continue
                found = _alignments(backward.shape(k), source)
                self.pairs[k, i] = next((a for a in found if probes.agrees(k, i, a)), _NONE)
        families = {(k, a.others): a.calls for (k, _), a in self.pairs.items() if a is not None and a is not _NONE}
        if _NONE in self.pairs.values() or sum(families.values()) > _MOST_CALLS:
            raise _TooDense(f"{backward.name}, whose Jacobian takes more than {_MOST_CALLS} calls of its backward")
        self.key = tuple((pair, None if a is None else a.key) for pair, a in self.pairs.items())

    def fits(self, probes: _Probes) -> bool:
        """Say whether a backward at another point still depends so."""
        return all(probes.agrees(k, i, alignment) for (k, i), alignment in self.pairs.items())


_NONE = object()   # no alignment that is cheap enough


class _Jacobian:
    """The local Jacobian of a node: per pair (output, input) its alignment and blocks (d, r, s)."""

    def __init__(self, backward: _Backward, pattern: _Pattern, probes: _Probes):
        self.inputs = backward.inputs
        self.shapes = {k: backward.shape(k) for k in backward.outputs}
        self.blocks = {
            (k, i): (a, a.blocks(probes.rows(k, a.others)[i])) for (k, i), a in pattern.pairs.items() if a is not None
        }


def _random_cotangents(backward: _Backward) -> dict:
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for k in backward.outputs:
        drawn[k] = torch.randn(backward.shape(k), generator=generator, dtype=torch.float64).to(backward.zeros(k))
    return drawn


def _read(node) -> tuple:
    backward = _Backward(node)
    pattern = _patterns.get(backward.key)
    if isinstance(pattern, _TooDense):
        raise pattern
    probes = _Probes(backward, _random_cotangents(backward) if pattern is None else pattern.cotangents)
    if pattern is None or not pattern.fits(probes):
        if len(_patterns) >= _MOST_PATTERNS:
            _patterns.clear()
        try:
            pattern = _patterns[backward.key] = _Pattern(probes)
        except _TooDense as error:
            _patterns[backward.key] = error
            raise
    return (Keyed(_Jacobian(backward, pattern, probes), (pattern.key, backward.key)),)


def _function(op, found: Keyed):
    jacobian = found.value
    for k, shape in jacobian.shapes.items():
        name = f"output {k}"
        op.temporary(name, shape)
        for (output, i), (alignment, blocks) in jacobian.blocks.items():
            if output == k and op.needs[jacobian.inputs[i]]:
                _add_product(op, jacobian.inputs[i], alignment, blocks, name)
        op.view(name, lambda y: y, out=k)


def _add_product(op, i: int, a: _Alignment, blocks: torch.Tensor, name: str) -> None:
    """Output += J x of one pair."""
    d, r, s = blocks.shape
    op.view(i, lambda x: x.permute((*a.partners, *a.rest)), out="aligned")
    op.temporary("part", (d, 1, s))
    op.reshape("aligned", (d, 1, r), out="rows")
    if r == s == 1:
        op.scale("rows", blocks, out="part")
    else:
        op.matmul("rows", right=blocks, out="part")
    order = [(*a.aligned, *a.others).index(k) for k in range(len(a.shape))]
    op.view("part", lambda y: y.view((*a.sizes, *(a.shape[k] for k in a.others))).permute(order), out="part")
    op.add("part", out=name)


FUNCTION = Rule(_function, (), _read)   # of any torch.autograd.Function that has no rule of its own
