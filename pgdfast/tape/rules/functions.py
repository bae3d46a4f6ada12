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
_patterns: dict[tuple, _Pattern | None] = {}   # None: it has none that is cheap enough


class _Backward:
    """A Function's backward as a plain call.

    outputs: numbers of those that are used. inputs: of those that may have cotangents; shapes: theirs.
    """

    def __init__(self, node, used: tuple[int, ...]):
        self._node, self._metadata, self.name = node, node._input_metadata, node.name()
        self.outputs = [k for k in used if self._metadata[k].dtype.is_floating_point]
        self.inputs = [i for i, (child, _) in enumerate(node.next_functions) if child is not None]
        children = [node.next_functions[i] for i in self.inputs]
        self.shapes = [tuple(child._input_metadata[number].shape) for child, number in children]
        self._places = [k for k, needed in enumerate(node.needs_input_grad) if needed]
        if len(self._places) != len(self.inputs):
            raise UnsupportedStructure(f"{self.name}, whose inputs cannot be told apart")
        shapes = tuple([self.shape(k) for k in range(len(self._metadata))])
        self.key = type(node), shapes, tuple(self.outputs), tuple(self.inputs), tuple(self.shapes)

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
    """Dimensions of an output, and those of an input that go with them; `others` and `rest`: what remains of both.

    shared: are the blocks (r, s) the same for all d, as a linear layer's are for all samples? Then one call tells of one s for
    every d. calls: how many there are.
    """

    def __init__(self, shape: tuple, source: tuple, aligned: tuple, partners: tuple, shared: bool):
        self.shape, self.aligned, self.partners, self.shared = shape, aligned, partners, shared
        self.others = tuple(d for d in range(len(shape)) if d not in aligned)
        self.rest = tuple(d for d in range(len(source)) if d not in partners)
        self.sizes = tuple([shape[d] for d in (*self.others, *aligned)])
        self.d, self.s = math.prod(shape[d] for d in aligned), math.prod(shape[d] for d in self.others)
        self.r = math.prod(source[d] for d in self.rest)
        self.calls = -(-self.s // self.d) if shared and self.d else self.s
        self.key = aligned, partners, shared
        self.family = self.others, aligned if shared else ()   # alignments with the same one share their calls

    def of_output(self, u: torch.Tensor) -> torch.Tensor:
        """A tensor of the output's shape as (s, d)."""
        return u.permute((*self.others, *self.aligned)).reshape(self.s, self.d)

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the input's shape as (d, r)."""
        return x.permute((*self.partners, *self.rest)).reshape(self.d, self.r)

    def to_output(self, y):
        """A tensor (s, d) as a view of the output's shape."""
        order = (*self.others, *self.aligned)
        return y.view(self.sizes).permute([order.index(d) for d in range(len(order))])

    def cotangents(self, like: torch.Tensor):
        """Those of the calls, in turn."""
        columns = torch.arange(self.d, device=like.device)
        for call in range(self.calls):
            u = like.new_zeros(self.s, self.d)
            if self.shared:
                rows = call * self.d + columns
                u[rows[rows < self.s], columns[rows < self.s]] = 1
            else:
                u[call] = 1
            yield self.to_output(u)

    def blocks(self, pulled: list) -> torch.Tensor:
        """What the calls gave for the input as (d, r, s); as (s, r) where shared."""
        parts = [self.of_input(x) for x in pulled]
        return torch.cat(parts)[: self.s] if self.shared else torch.stack(parts, 2)

    def adjoint(self, blocks: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """J^T u as (d, r)."""
        u = self.of_output(u)
        return u.mT @ blocks if self.shared else torch.einsum("drs,sd->dr", blocks, u)


def _alignments(shape: tuple, source: tuple) -> list[_Alignment]:
    """All there are, the one with the fewest calls first."""
    wide = [d for d, n in enumerate(shape) if n > 1]
    found = []
    for count in range(len(wide) + 1):
        for aligned in itertools.permutations(wide, count):
            for partners in itertools.combinations(range(len(source)), count):
                if all(shape[a] == source[b] for a, b in zip(aligned, partners, strict=True)):
                    found += [_Alignment(shape, source, aligned, partners, shared) for shared in (False, True)]
    useful = [a for a in found if a.calls <= _MOST_CALLS and not (a.shared and 1 in (a.d, a.s))]
    return sorted(useful, key=lambda a: a.calls)


class _Probes:
    """Calls of a backward at one point, each made once."""

    def __init__(self, backward: _Backward, cotangents: dict):
        self.backward, self.cotangents, self._pulled, self._blocks, self._checks = backward, cotangents, {}, {}, {}

    def blocks(self, k: int, i: int, a: _Alignment) -> torch.Tensor | None:
        """The local Jacobian of output k by input i, None for zero."""
        if (k, i, a.key) not in self._blocks:
            if (k, a.family) not in self._pulled:
                self._pulled[k, a.family] = [self.backward(k, u) for u in a.cotangents(self.backward.zeros(k))]
            parts = [pulled[i] for pulled in self._pulled[k, a.family]]
            like = next((x for x in parts if x is not None), None)
            self._blocks[k, i, a.key] = None if like is None else a.blocks(
                [torch.zeros_like(like) if x is None else x for x in parts])
        return self._blocks[k, i, a.key]

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
        blocks = self.blocks(k, i, alignment)
        if blocks is None or expected is None:
            return False
        expected = alignment.of_input(expected)
        found = alignment.adjoint(blocks, self.cotangents[k])
        tolerance = _TOLERANCE.get(expected.dtype, _COARSE)
        return bool((found - expected).norm() <= tolerance * expected.norm())   # False for NaN


class _Pattern:
    """The alignment of every pair (output, input), None where there is no dependence; the random cotangents."""

    def __init__(self, probes: _Probes):
        backward = probes.backward
        self.cotangents, self.pairs = probes.cotangents, {}
        calls = {}
        for k in backward.outputs:
            for i, source in enumerate(backward.shapes):
                pair = None
                if not probes.agrees(k, i, None):
                    found = _alignments(backward.shape(k), source)
                    pair = next((a for a in found if probes.agrees(k, i, a)), None)
                    if pair is None:
                        raise _too_dense(backward)
                    calls[k, pair.family] = pair.calls
                self.pairs[k, i] = pair
        if sum(calls.values()) > _MOST_CALLS:
            raise _too_dense(backward)
        self.key = tuple((pair, None if a is None else a.key) for pair, a in self.pairs.items())

    def fits(self, probes: _Probes) -> bool:
        """Say whether a backward at another point still depends so."""
        return all(probes.agrees(k, i, alignment) for (k, i), alignment in self.pairs.items())


def _too_dense(backward: _Backward) -> UnsupportedStructure:
    return UnsupportedStructure(f"{backward.name}, whose Jacobian takes more than {_MOST_CALLS} calls of its backward")


class _Jacobian:
    """The local Jacobian of a node: per pair (output, input) its alignment and blocks."""

    def __init__(self, backward: _Backward, pattern: _Pattern, probes: _Probes):
        self.inputs = backward.inputs
        self.shapes = {k: backward.shape(k) for k in backward.outputs}
        self.blocks = {
            (k, i): (a, probes.blocks(k, i, a)) for (k, i), a in pattern.pairs.items() if a is not None
        }


def _random_cotangents(backward: _Backward) -> dict:
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for k in backward.outputs:
        drawn[k] = torch.randn(backward.shape(k), generator=generator, dtype=torch.float64).to(backward.zeros(k))
    return drawn


def _read(node, used: tuple[int, ...]) -> tuple:
    backward = _Backward(node, used)
    try:
        jacobian, key = _probed(backward)
    except (UnsupportedStructure, MemoryError):
        raise
    except Exception as error:
        if "second time" in str(error):   # the tape is gone
            raise
        raise UnsupportedStructure(f"{backward.name}, whose backward raises when it is called by itself: {error}") from error
    return (Keyed(jacobian, key),)


def _probed(backward: _Backward) -> tuple[_Jacobian, tuple]:
    pattern = _patterns.get(backward.key)
    if pattern is None and backward.key in _patterns:
        raise _too_dense(backward)
    probes = _Probes(backward, _random_cotangents(backward) if pattern is None else pattern.cotangents)
    if pattern is None or not pattern.fits(probes):
        if len(_patterns) >= _MOST_PATTERNS:
            _patterns.clear()
        try:
            pattern = _patterns[backward.key] = _Pattern(probes)
        except UnsupportedStructure:
            _patterns[backward.key] = None
            raise
    return _Jacobian(backward, pattern, probes), (pattern.key, backward.key)


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
    op.view(i, lambda x: x.permute((*a.partners, *a.rest)), out="aligned")
    op.temporary("product", (a.s, a.d))
    if a.shared:
        op.reshape("aligned", (a.d, a.r), out="rows")
        op.view("rows", lambda x: x.mT, out="columns")
        op.matmul("columns", left=blocks, out="product")
    else:
        op.reshape("aligned", (a.d, 1, a.r), out="rows")
        op.view("product", lambda y: y.mT[:, None], out="blocks")
        if a.r == a.s == 1:
            op.scale("rows", blocks, out="blocks")
        else:
            op.matmul("rows", right=blocks, out="blocks")
    op.view("product", a.to_output, out="product")
    op.add("product", out=name)


def _for_used(structure, position: int) -> Rule:
    used = structure.used(position)
    return Rule(_function, (), lambda node: _read(node, used))


FUNCTION = Rule(_function, (), _read, _for_used)   # of any torch.autograd.Function that has no rule of its own
