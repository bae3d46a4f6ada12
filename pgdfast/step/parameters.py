"""Moving the parameters of one network, or of the members of an ensemble, and back bit for bit."""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..kernels import native
from ..tape import has_complex, real_views


class Point(NamedTuple):
    """Where to go: theta - t (rates * direction); a displacement has the learning rates in it already, and t = 1.

    direction: (P,).
    """

    direction: torch.Tensor
    t: float = 1.0
    displacement: bool = False


class Parameters:
    """The parameters theta of one network, or of B stacked ones, with a copy to return to.

    params: the tensors; with `count` B, each has the members on its first dimension. reals: their real numbers, in the same
    memory; sizes: of each, of one member. away: the members that are not at theta.
    """

    def __init__(self, params: list[torch.Tensor], count: int | None):
        self.params, self.count, self.stacked = params, count or 1, count is not None
        self._complex = has_complex(params)
        self.reals = real_views(params) if self._complex else params
        self.sizes = [p.numel() // self.count for p in self.reals]
        self.away: set[int] = set()
        self.touched = False   # since products with J were last possible
        self._saved: list[torch.Tensor] | None = None
        self._rates: list[list[float]] = []
        self.common_rates: list[float | None] = []   # each member's learning rate, None where its parameters have several
        self._factors: list[float] = []
        self._square: float | None = None

    def begin(self, rates: list[list[float]], square: float | None) -> None:
        """Start a step from here, of which a copy is kept: learning rates of each parameter, by member; norm constraint."""
        if self._complex:   # a parameter's memory may be another now
            self.reals = real_views(self.params)
        self._rates, self._square, self._factors = rates, square, [1.0] * self.count
        self.common_rates = []
        for each in rates:
            self.common_rates.append(each[0] if each.count(each[0]) == len(each) else None)
        self.away.clear()
        self.touched = False
        if self._saved is None:
            self._saved = [torch.empty_like(p, requires_grad=False) for p in self.reals]
        if not native.copy_tensors(self._saved, self.reals):
            self._copy(self._saved, self.reals)

    # --- learning rates ---------------------------------------------------------------------------------------------------

    def rates(self, b: int) -> list[float]:
        """Member b's learning rates, one per parameter, shortened by the norm constraint."""
        factor, rates = self._factors[b], self._rates[b]
        return rates if factor == 1 else [factor * rate for rate in rates]

    def theta(self, b: int) -> torch.Tensor:
        """Member b's parameters before the step, (P,), float64."""
        saved = self._saved or self.reals
        return torch.cat([(p[b] if self.stacked else p).detach().reshape(-1).double() for p in saved])

    def moving(self, b: int) -> torch.Tensor | None:
        """Which of member b's parameters have a learning rate above 0, (P,); None for all."""
        if all(self._rates[b]):
            return None
        return torch.cat([
            p.new_full((size,), rate != 0, dtype=torch.bool)
            for p, size, rate in zip(self.reals, self.sizes, self._rates[b], strict=True)
        ])

    def shortened(self, b: int) -> bool:
        """Whether the norm constraint makes member b's step shorter."""
        return self._factors[b] != 1

    def scaled(self, b: int, direction: torch.Tensor) -> torch.Tensor:
        """A direction with each parameter's part times its learning rate, (P,)."""
        return torch.cat([rate * part for rate, part in zip(self.rates(b), direction.split(self.sizes), strict=True)])

    def constrain(self, b: int, direction: torch.Tensor) -> None:
        """Shorten member b's rates, all by one factor, so that ||rates * d||^2 obeys the norm constraint, if there is one."""
        if self._square is not None:
            self._factors[b] = 1.0
            self._factors[b] = factor = self._fits(self.scaled(b, direction))
            if self.common_rates[b] is not None:
                self.common_rates[b] = factor * self._rates[b][0]

    def fitting(self, displacement: torch.Tensor) -> torch.Tensor:
        """A displacement, (P,), shortened where the norm constraint wants it."""
        factor = self._fits(displacement)
        return displacement if factor == 1 else factor * displacement

    def _fits(self, displacement: torch.Tensor) -> float:
        """The factor, at most 1, that makes a displacement obey the constraint."""
        if self._square is None:
            return 1.0
        length = float(torch.linalg.vector_norm(displacement, dtype=torch.float64))
        return self._square**0.5 / length if length * length > self._square else 1.0

    # --- moves ------------------------------------------------------------------------------------------------------------

    def go(self, points: dict[int, Point]) -> None:
        """Put these members at their points, from wherever they are; the others stay."""
        if self.away:
            self.back(points)
        self.touched = True
        self.away.update(points)   # first: what is interrupted on the way is to be undone
        if not self.stacked:
            point = points[0]
            rates = self._rates[0] if self._factors[0] == 1 else self.rates(0)
            if point.displacement:
                rates = [1.0] * len(self.params)
            if point.t != 1.0:
                rates = [rate * point.t for rate in rates]
            if not native.subtract(self.reals, rates, point.direction):
                with torch.no_grad():
                    for p, part, rate in zip(self.reals, point.direction.split(self.sizes), rates, strict=True):
                        p.add_(part.view(p.shape).to(p.dtype), alpha=-rate)
            return
        members = sorted(points)
        rows = _stacked([points[b].direction for b in members])
        each = {b: [1.0] * len(self.params) if points[b].displacement else self.rates(b) for b in members}
        for k, (p, part) in enumerate(zip(self.reals, rows.split(self.sizes, 1), strict=True)):
            self._subtract_rows(p, members, part, [each[b][k] * points[b].t for b in members])

    @torch.no_grad()
    def _subtract_rows(self, p: torch.Tensor, members: list[int], part: torch.Tensor, factors: list[float]) -> None:
        rows, part = p.detach().view(self.count, -1), part.to(p.dtype)
        same = factors.count(factors[0]) == len(factors)
        if not same:
            part = part * torch.tensor(factors, dtype=p.dtype, device=p.device)[:, None]
        alpha = -factors[0] if same else -1.0
        if len(members) == self.count:
            rows.add_(part, alpha=alpha)
        else:
            rows.index_add_(0, torch.tensor(members, device=p.device), part, alpha=alpha)

    def back(self, members) -> None:
        """Return these members to theta, bit for bit."""
        members = [b for b in members if b in self.away]
        if len(members) == len(self.away):
            self.all_back()
        elif members:
            places, self.touched = torch.tensor(members, device=self.params[0].device), True
            with torch.no_grad():
                for p, saved in zip(self.reals, self._saved, strict=True):
                    p.index_copy_(0, places, saved.index_select(0, places))
            self.away.difference_update(members)

    @contextmanager
    def home(self, b: int):
        """With member b at theta; then it is where it was."""
        if b not in self.away:
            yield
            return
        places = [p.detach()[b] if self.stacked else p for p in self.reals]
        there = [p.detach().clone() for p in places]
        self.back((b,))
        yield
        self.away.add(b)
        self.touched = True
        with torch.no_grad():
            for p, value in zip(places, there, strict=True):
                p.copy_(value)

    def all_back(self) -> None:
        """Return all members to theta, bit for bit."""
        if self.away:
            self.touched = True
            self._copy(self.reals, self._saved)
            self.away.clear()

    @staticmethod
    def _copy(to: list[torch.Tensor], given: list[torch.Tensor]) -> None:
        if not native.copy_tensors(to, given):
            with torch.no_grad():
                for a, b in zip(to, given, strict=True):
                    a.copy_(b)

    @torch.no_grad()
    def set_aside(self) -> tuple | None:
        """Return all members to theta, to be brought `forward` again to where they are now; None where none is away."""
        if not self.away:
            return None
        places = torch.tensor(sorted(self.away), device=self.params[0].device)
        there = places, [p.index_select(0, places) for p in self.reals]
        self._copy(self.reals, self._saved)
        return there

    @torch.no_grad()
    def forward(self, there: tuple | None) -> None:
        """Undo `set_aside`."""
        if there is not None:
            places, values = there
            self.touched = True
            for p, value in zip(self.reals, values, strict=True):
                p.index_copy_(0, places, value)

    @torch.no_grad()
    def decay(self, coefficients: list[list[float]]) -> None:
        """Subtract coefficient * theta of before the move from members that have moved (decoupled weight decay).

        coefficients: by member, by parameter.
        """
        places = sorted(self.away)
        for k, (p, saved) in enumerate(zip(self.reals, self._saved, strict=True)):
            each = [coefficients[b][k] for b in places]
            if not any(each):
                continue
            if not self.stacked:
                p.add_(saved, alpha=-each[0])
            else:
                each = torch.tensor(each, dtype=p.dtype, device=p.device)
                p[places] -= each.view(-1, *[1] * (p.dim() - 1)) * saved[places]

    def release(self) -> None:
        """Say that where the members are now is where they stay."""
        self.away.clear()


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """These vectors as one matrix; without a copy where they are the rows of one, in turn."""
    base = rows[0]._base
    size, width = rows[0].element_size(), rows[0].numel()
    if (
        base is not None and base.shape == (len(rows), width) and base.is_contiguous()
        and all(row.data_ptr() == base.data_ptr() + b * width * size and row._base is base for b, row in enumerate(rows))
    ):
        return base
    return torch.stack(rows)
