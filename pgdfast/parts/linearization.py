"""J = [J_1; ...; J_R]: the linearization whose rows come in parts, of batches or of processes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..linear import CHANGED_PARAMETERS, RELEASED, Products, loss_at, values_of
from .failures import settled
from .kernels import PartsKernels
from .probe import changed_loss, same_loss


class Part:
    """Some rows of J: the residuals `rows` of this process. lin: their linearization, None where its tape was not kept."""

    def __init__(self, number: int, size: int, lin):
        self.number, self.size, self.lin = number, size, lin
        self.loss, self.residual, self.sigma = float(lin.loss), lin.residual, None
        self.rows = slice(0, 0)

    def scale(self, scales, shares, dtype: torch.dtype) -> None:
        """Multiply the rows of each term k by the root of its scale s_k."""
        if all(s == 1 for s in scales):
            return
        roots = torch.tensor([math.sqrt(s) for s in scales], dtype=torch.float64)
        sizes = torch.tensor([share.size for share in shares])
        self.sigma = roots.repeat_interleave(sizes).to(self.residual.device, dtype)
        if self.lin is not None:
            self.lin.scale_rows(self.sigma)
            self.residual = self.lin.residual
        else:
            self.residual = self.residual * self.sigma


class Rows(NamedTuple):
    """What predictions of cost and memory ask of a row layout (linear/rows.py); of all parts together."""

    num_rows: int
    max_outputs: int
    flops: float
    packed: int
    explicit_columns: int
    largest: int

    @classmethod
    def of(cls, layout) -> tuple:
        """A part's, in plain numbers."""
        return cls(
            layout.num_rows, layout.max_outputs, layout.flops, layout.packed, layout.explicit_columns, layout.largest
        )

    @classmethod
    def together(cls, parts: list, sizes: list[int]) -> Rows:
        """Of several parts. Operations of a Gram matrix grow with the square of its residuals; factors are held all at once."""
        total = sum(sizes)
        densest = max((rows.flops / max(size, 1) ** 2 for rows, size in zip(parts, sizes, strict=True)), default=0.0)
        packed = sum(rows.packed for rows in parts)
        return cls(
            sum(rows.num_rows for rows in parts), max(rows.max_outputs for rows in parts), densest * total**2, packed,
            max(rows.explicit_columns for rows in parts), packed,
        )


class Parts(Products):
    """A SolvableLinearization of the rows of all batches and processes, scaled so that they are those of one closure.

    P-vectors are the same in every process, and so are M-vectors, of which a process computes its own rows: nobody above knows
    of parts. Products go through the parts one by one; those whose tape was not kept run their closure again.
    Attributes beside the protocol's: count, of parts; kept, of those whose tapes are held in all processes; reruns, of closures
    for products so far, in this process.
    """

    def __init__(self, linearizer, batched, parts: list[Part], known: list[list], combination, penalties: dict):
        self.group, self.params, self.choices = linearizer.group, linearizer.one.reals, linearizer.choices
        self._linearizer, self._batched, self.parts, self._combination = linearizer, batched, parts, combination
        self._uniform, self.penalties = combination.uniform, penalties
        flat = [fact for each in known for fact in each]
        whole = [fact for fact in flat if fact.size] or flat
        self.facts = flat
        self.dtype, self.device = linearizer.one.dtype, self.params[0].device
        self.num_residuals, self.num_parameters = sum(f.size for f in flat), sum(p.numel() for p in self.params)
        self._first = sum(map(len, known[: self.group.rank]))   # the number of this process's first part among all
        self.sizes = [sum(f.size for f in each) for each in known]   # residuals of each process
        at = sum(self.sizes[: self.group.rank])
        for part in parts:
            part.rows = slice(at, at + part.size)
            at += part.size
        self.scalar = whole[0].scalar
        self.has_squares_only = all(f.has_squares_only for f in whole)
        self.tapeless, self.residuals_need_tape = all(f.tapeless for f in flat), any(f.residuals_need_tape for f in flat)
        self.tape_bytes = max(f.arena for f in flat) * self.dtype.itemsize
        self.nodes = max(f.nodes for f in flat)
        self.coupling = next((f.coupling for f in flat if f.coupling), "")
        self.count, self.reruns = len(flat), 0
        self.kept = sum(f.kept for f in flat)
        self._layout = None
        if all(f.rows is not None for f in whole):
            self._layout = Rows.together([Rows(*f.rows) for f in whole], [f.size for f in whole])
        own = flat[self._first : self._first + len(parts)]
        self.value = self.loss_of([(fact.loss, fact.terms) for fact in own])   # as at trial points, to the bit
        self.loss = torch.tensor(self.value, dtype=whole[0].loss_dtype, device=self.device)
        self.residual = self.joined([part.residual for part in parts])
        if not math.isfinite(self.value) and self.num_residuals:
            raise settled(ValueError(
                f"pgdfast.LM: the loss before the step is {self.value}; nothing was changed. Check the data and the parameters "
                "for NaN or infinity."
            ))
        self._versions, self._released, self._wide, self._widens = self._now(), False, None, False
        self._operator = PartsKernels(self)
        batched.value, batched.section = self._trial, self.group.section

    # --- the parts --------------------------------------------------------------------------------------------------------

    def visit(self, do) -> list:
        """[do(part, its linearization)] for the parts of this process, in order.

        Tapes that were not kept are made anew, and let go of again. Raises ValueError where a closure then has another loss.
        """
        found = {}
        for part in self.parts:
            if part.lin is not None:
                found[part.number] = do(part, self._precise(part.lin))
        missing = {part.number: part for part in self.parts if part.lin is None}
        if missing:
            def again(number: int, result) -> None:
                lin = self._remade(missing[number], result)
                try:
                    found[number] = do(missing[number], self._precise(lin))
                finally:
                    lin.release()

            with self._batched.repeated(), torch.enable_grad():
                self._batched.run(again, "products", set(missing))
            self.reruns += len(missing)
        return [found[part.number] for part in self.parts]

    def _precise(self, lin):
        if not self._widens:
            return lin
        wide = lin.widened()
        wide.row_layout()   # for its kernels
        return wide

    def _remade(self, part: Part, result):
        lin = self._linearizer.one.read(result)
        loss = float(lin.loss)
        if lin.num_residuals != part.size or not same_loss(part.loss, loss, lin.loss.dtype):
            raise ValueError(changed_loss(self._batched.name(part.number), part.loss, loss))
        if part.sigma is not None:
            lin.scale_rows(part.sigma)
        return lin

    def _now(self) -> list[int]:
        return [p._version for p in self._linearizer.params]

    # --- losses -----------------------------------------------------------------------------------------------------------

    def _trial(self, number: int, result) -> tuple[float, tuple | None]:
        """What is kept of a closure's result at a trial point: the loss, and its terms where they differ in scale."""
        if self._uniform is not None:
            return float(loss_at(result, self.scalar)), None
        return 0.0, self._linearizer.terms(result, self.scalar)

    def loss_of(self, found: list[tuple[float, tuple | None]]) -> float:
        """The loss of all rows at the parameters' present values, of what a run of the batches has gathered."""
        penalty = self._linearizer.one.tracer.penalty_value(self.penalties)
        own = sum(
            self._added(k, loss, terms, penalty) for k, (loss, terms) in enumerate(found, self._first)
        )
        return float(self.group.total(torch.tensor([own], dtype=torch.float64, device=self.device))) + penalty

    def _added(self, k: int, loss: float, terms: tuple | None, penalty: float) -> float:
        """What part k adds to the loss beside penalties."""
        if not self.facts[k].size:
            return 0.0
        if self._uniform is not None:
            return self._combination.added(k, loss - penalty)
        if not terms:
            raise ValueError(
                "pgdfast.LM: the terms of the loss count differently in its parts (their means are over different numbers), "
                "and the value of one cannot be told; return the residuals of each term, or give all batches equally many rows."
            )
        return self._combination.added_by_terms(k, terms)

    def residual_at(self, run) -> tuple[float, torch.Tensor]:
        """(loss, residual (M,)) at the parameters' present values; see linear.Linearization."""
        self._batched.value = self._moved
        try:
            found = run()
        finally:
            self._batched.value = self._trial
        return self.loss_of([one[:2] for one in found]), self.joined([one[2] for one in found])

    def _moved(self, number: int, result):
        part = self.parts[number]
        value, residual = values_of(result, self._linearizer.one.tracer, self.residuals_need_tape)
        if residual.numel() != part.size:
            raise ValueError(
                f"pgdfast.LM: the closure returned {part.size} residuals before the step and {residual.numel()} at a trial "
                "point; with acceleration their number must not change within a step."
            )
        residual = residual.to(self.dtype)
        terms = None
        if self._uniform is None:
            terms = self._linearizer.terms(result, self.scalar)
        return value, terms, residual if part.sigma is None else residual * part.sigma

    def joined(self, own: list[torch.Tensor]) -> torch.Tensor:
        """The M-vector of which this process has these parts."""
        return self.group.joined(torch.cat([torch.empty(0, dtype=self.dtype, device=self.device), *own]), self.sizes)

    # --- the protocol -----------------------------------------------------------------------------------------------------

    def kernels(self) -> PartsKernels:
        """Products by parts. Raises RuntimeError where the parameters have changed or this was released."""
        if self._released:
            raise RuntimeError(RELEASED)
        if self._now() != self._versions:
            raise RuntimeError(CHANGED_PARAMETERS)
        return self._operator

    def row_layout(self) -> Rows | None:
        """What solvers ask of the rows; None where those of a part do not separate."""
        return self._layout

    @property
    def sync_reason(self) -> str:
        """Why steps over parts are not captured."""
        return "the closure runs for each part of its rows"

    def ggn(self, v: torch.Tensor) -> torch.Tensor:
        """(J^T J + penalty) v: (P,) -> (P,), without M-vectors between processes."""
        product = self.kernels().product(v.detach().to(self.dtype))
        return product if self.penalty is None else product + self.penalty * v.to(self.dtype)

    def ggns(self, V: torch.Tensor) -> torch.Tensor:
        """The same for each row of V, (K, P), in one pass through the parts."""
        products = self.kernels().product(V.detach().to(self.dtype))
        return products if self.penalty is None else products + self.penalty * V.to(self.dtype)

    def agreed(self, number: float) -> float:
        """The least of all processes' numbers, so that they decide alike."""
        return self.group.least(number)

    def widened(self) -> Parts:
        """The same in float64, or itself where that is not to be had."""
        if self.dtype == torch.float64:
            return self
        if self._wide is None:
            wide = object.__new__(Parts)
            wide.__dict__.update(self.__dict__)
            wide.dtype, wide._widens, wide.residual, wide._penalty = torch.float64, True, self.residual.double(), None
            wide._operator, wide.choices = PartsKernels(wide), {}
            self._wide = wide
        return self._wide

    def before_trial(self) -> None:
        """Say that the closures are about to run again."""
        for part in self.parts:
            if part.lin is not None:
                part.lin.before_trial()

    def parameters_unchanged(self) -> None:
        """Declare the parameters to be those of the linearization, bit for bit."""
        for part in self.parts:
            if part.lin is not None:
                part.lin.parameters_unchanged()
        self._versions[:] = self._now()   # in place: the widened one shares the list

    def doubt(self) -> None:
        """Compare the next tapes of these structures with autograd."""
        for part in self.parts:
            if part.lin is not None:
                part.lin.doubt()

    def release(self) -> None:
        """Let go of the tapes."""
        for part in self.parts:
            if part.lin is not None:
                part.lin.release()
                part.lin = None
        self._operator.release()
        if self._wide is not None:
            self._wide._operator.release()
            self._wide._released = True
        self._released = True

    def tell(self, report) -> None:
        """Write into a step's report what its parts took."""
        report.parts, report.kept, report.reruns, report.sent = self.count, self.kept, self.reruns, self.group.words
