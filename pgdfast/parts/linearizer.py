"""A closure's parts, linearized: one run of the closure for each, and how their rows combine."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import NamedTuple

import torch

from ..kernels.memory import available_memory
from ..linear import Linearizer, code_of, functions_in, half_square
from .batches import Batched
from .combine import Combination, common_penalties
from .failures import alike
from .group import Alone
from .linearization import Part, Parts, Rows
from .probe import probe, probe_together, same_generators

_SURELY_FITS = 64e6   # bytes of programs up to which the memory that is available is not asked for
_SHARE = 0.25   # of the memory that is available: for programs that are kept, unless a budget is given


def checked_memory(memory, where: str = "LM") -> float | None:
    """The option memory. Raises ValueError unless it is None or a number of bytes."""
    if memory is not None and not (isinstance(memory, (int, float)) and memory >= 0):
        raise ValueError(f"pgdfast.{where}: memory is {memory!r}; it must be None or a number of bytes.")
    return memory


class Facts(NamedTuple):
    """What every process knows of a part, whoever has it.

    shares: how its terms combine. size: its residuals. loss: as its closure returned it; terms: the loss term by term, None
    where nobody asked. penalties: (parameter number, coefficient). flops, arena, nodes, constants: of its
    program, the last in bytes. rows: num_rows, max_outputs, operations of its Gram matrix, packed elements, explicit columns;
    None where rows do not separate. adds_normal, packs: what its kernels have; kept: is its program
    held? The rest: of its linearization.
    """

    shares: tuple
    size: int
    loss: float
    terms: tuple | None
    penalties: tuple
    flops: float
    arena: int
    nodes: int
    constants: int
    rows: tuple | None
    adds_normal: bool
    packs: bool
    coupling: str
    scalar: bool
    has_squares_only: bool
    tapeless: bool
    residuals_need_tape: bool
    loss_dtype: torch.dtype
    kept: bool = True


class PartsLinearizer:
    """Linearizes closures over parts of their rows, for fixed parameters.

    Args:
        params: the parameters.
        backend, check: as for LM.
        group: of the processes that share the rows, `Alone` or `Ranks`.
        budget: bytes that kept programs may take in this process, None for a quarter of the memory that is available.
    """

    def __init__(self, params, backend: str, check: str, group, budget: float | None = None):
        self.one, self._check = Linearizer(params, backend, check), check
        self.group, self._budget = group, budget
        self.params = self.one.params
        if not isinstance(group, Alone):
            self.one.tracer.join_group()
        self._known: tuple = None, None   # the shares of all parts, and how they combine
        self._asked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()   # by the code of closures, what `_settle` found
        self.choices: dict = {}           # see SolvableLinearization
        self._sizes: tuple | None = None

    def __call__(self, batched: Batched) -> Parts:
        """Run the closure once for each batch and read its tapes, of which those that fit into the budget are kept.

        Raises ValueError as Linearizer does, where there is no batch at all, and where parts do not combine.
        """
        parts: list[Part] = []
        facts: list[Facts] = []
        held, settled = 0, ()
        budget = _SURELY_FITS if self._budget is None else self._budget
        split = self._known[1] is None or self._known[1].uniform is None   # is the loss wanted term by term?
        self.group.start(self.params)

        def visit(number: int, result) -> None:
            nonlocal held, budget, settled
            lin = self.one.read(result)
            fact = self._facts(lin, result, split)
            if fact.size:
                settled = self._settle(batched, fact) or settled
            if self._budget is None and budget == _SURELY_FITS < held + fact.constants:   # only now is it worth asking
                budget = held + _available(self.params[0].device)
            part = Part(number, fact.size, lin)
            parts.append(part)
            if held + fact.constants > budget:
                fact, part.lin = fact._replace(kept=False), None
                lin.release()
            else:
                held += fact.constants
            facts.append(fact)

        with self.group.section(), torch.enable_grad():
            batched.run(visit, "linearization")
        told = self.group.objects((facts, settled))
        known = [each for each, _ in told]
        with alike():
            if not any(known):
                raise ValueError("pgdfast: there are no batches; give it at least one.")
            combination, penalties = self._combination(known, next((one for _, one in told if one), ()), batched)
        if combination.uniform is None and not split:   # as it was with the batches of before
            terms = self._terms_again(batched, facts)
            facts = [fact._replace(terms=one) for fact, one in zip(facts, terms, strict=True)]
            known[self.group.rank] = facts
        first = sum(map(len, known[: self.group.rank]))
        for k, (part, fact) in enumerate(zip(parts, facts, strict=True), first):
            part.scale(combination.scales[k], fact.shares, self.one.dtype)
        sizes = tuple((f.size, f.rows, f.flops) for each in known for f in each)
        if sizes != self._sizes:
            self.choices.clear()
            self._sizes = sizes
        return Parts(self, batched, parts, known, combination, penalties)

    def _terms_again(self, batched: Batched, facts: list[Facts]) -> list:
        """The losses of this process's parts term by term, for a run of their closure more."""
        with self.group.section(), batched.repeated(), torch.enable_grad():
            return batched.run(lambda number, result: self.terms(result, facts[number].scalar), "linearization")

    def _settle(self, batched: Batched, fact: Facts) -> tuple:
        """What parts of a batch tell of the terms of which its tape does not tell; see probe.Probed.

        Asked once of a closure whose loss ends in these terms, and again where its tape gets another length, as batch norm
        does from eval() to train(). Raises ValueError where the loss on the batch is not what those on its parts combine to.
        """
        if batched.batches is None or self._check == "never":
            return ()
        terms = fact.nodes, functions_in(batched.given_closure), *[(share.kind, share.operation) for share in fact.shares]
        code = code_of(batched.given_closure)
        known = self._asked.setdefault(code, {}) if code is not None else {}
        closure, tracer, first = batched.given_closure, self.one.tracer, terms not in known
        with same_generators():
            if first or self._check == "every":
                known[terms] = probe(closure, batched.batch, tracer, fact.loss)
            elif not known[terms].told and batched.before is not None:   # at the second batch
                known[terms] = probe_together(closure, batched.before, batched.batch, tracer)._replace(told=True)
        if known[terms].disagreement:
            raise ValueError(known.pop(terms).disagreement)
        return known[terms].settled

    def _facts(self, lin, result, split: bool) -> Facts:
        shares = self.one.tracer.shares(result, lin.residual)
        rows = lin.row_layout()
        kernels = lin.kernels()   # which may depend on the rows
        terms = self.terms(result, lin.scalar) if split and len(shares) > 1 and lin.num_residuals else None
        exact = lin.scalar or lin.loss.dtype == torch.float64   # else a trial at the same point may find another last digit
        loss = float(lin.loss if exact else half_square(lin.residual))
        return Facts(
            shares, lin.num_residuals, loss, terms, tuple(sorted(lin.penalties.items())), kernels.flops,
            kernels.arena_size, lin.nodes, lin.constant_bytes, None if rows is None else Rows.of(rows),
            hasattr(kernels, "add_normal"), kernels.packs, lin.coupling, lin.scalar, lin.has_squares_only, lin.tapeless,
            lin.residuals_need_tape, lin.loss.dtype,
        )

    def terms(self, result, scalar: bool) -> tuple | None:
        """The loss of a result term by term, None where that cannot be told."""
        if not scalar:
            return tuple(float(half_square(part)) for part in (result if isinstance(result, (tuple, list)) else [result]))
        with torch.enable_grad():
            found = self.one.tracer.term_values(result.reshape(()) if result.dim() else result)
        return None if found is None else tuple(found)

    def _combination(self, known: list[list[Facts]], settled: tuple, batched: Batched) -> tuple[Combination, dict]:
        flat = [(rank, number, fact) for rank, each in enumerate(known) for number, fact in enumerate(each)]

        def name(k: int) -> str:
            rank, number, _ = flat[k]
            what = [batched.name(number)] if batched.batches is not None else []
            return " of ".join(what + ([f"rank {rank}"] if self.group.size > 1 else [])) or "the closure"

        shares = tuple(fact.shares for _, _, fact in flat)
        penalties = common_penalties([dict(fact.penalties) if fact.size else None for _, _, fact in flat], name)
        plain = settled, tuple(tuple(replace(share, value=None) for share in part) for part in shares)
        if self._known[0] == plain and "once" not in settled:   # which holds where values are the same
            return self._known[1], penalties
        combination = Combination(shares, name, settled)
        self._known = plain, combination
        return combination, penalties


def _available(device: torch.device) -> float:
    """Bytes that further programs may take where no budget is given."""
    available = available_memory(device)
    return _SHARE * available if available < math.inf else 4e9
