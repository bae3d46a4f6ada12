"""The parameters of an ensemble moved member by member, each along its own direction."""

from __future__ import annotations

import torch


class MembersMove:
    """theta_b - t_b (rates_b * d_b) for stacked parameters, with a copy to return to.

    params: tensors with the B members first. rates: per parameter, the B learning rates.
    """

    def __init__(self, params: list[torch.Tensor], rates: list):
        self.params, self.count = params, len(params[0])
        self._sizes = [p.numel() // self.count for p in params]
        self._per_member = rates
        self._plain = all(rate == 1.0 for each in rates for rate in each)
        self._saved = [p.detach().clone() for p in params]
        self._moves = torch.zeros(self.count, sum(self._sizes), dtype=params[0].dtype, device=params[0].device)
        self.moved: set[int] = set()

    def of(self, b: int) -> OneMember:
        """Member b, as solvers' predictions want to see it."""
        return OneMember(self, b)

    def rates(self, b: int) -> list[float]:
        """Member b's learning rate for each parameter."""
        return [rates[b] for rates in self._per_member]

    def scaled(self, b: int, direction: torch.Tensor) -> torch.Tensor:
        """Member b's direction, each parameter's part times its learning rate, (P,)."""
        rates = self.rates(b)
        if rates.count(rates[0]) == len(rates):
            return direction if rates[0] == 1 else rates[0] * direction
        return torch.cat([rate * part for rate, part in zip(rates, direction.split(self._sizes), strict=True)])

    def to(self, directions: dict[int, torch.Tensor], lengths: dict[int, float]) -> None:
        """Put these members at theta - t (rates * d); the others stay where they are."""
        if not directions:
            return
        if self._plain and all(t == 1.0 for t in lengths.values()):
            rows = list(directions.values())
        else:
            rows = [self.scaled(b, d) if lengths[b] == 1.0 else lengths[b] * self.scaled(b, d) for b, d in directions.items()]
        places = torch.tensor(list(directions), device=self._moves.device)
        self._moves.index_copy_(0, places, torch.stack(rows).to(self._moves.dtype))
        self.moved |= directions.keys()
        self._apply()

    def back(self, members) -> None:
        """Return these members to where they were, bit for bit."""
        members = [b for b in members if b in self.moved]
        if members:
            self._moves[members] = 0.0
            self.moved -= set(members)
            self._apply()

    @torch.no_grad()
    def undo(self) -> None:
        """Return all members to where they were, exactly, and forget their moves."""
        for p, saved in zip(self.params, self._saved, strict=True):
            p.copy_(saved)
        self._moves.zero_()
        self.moved = set()

    @torch.no_grad()
    def at_start(self) -> None:
        """Put all parameters back while keeping in mind where members have moved; `resume` goes there again."""
        for p, saved in zip(self.params, self._saved, strict=True):
            p.copy_(saved)

    def resume(self) -> None:
        """Go where members had moved before `at_start`."""
        self._apply()

    @torch.no_grad()
    def decay(self, coefficients: list) -> None:
        """Subtract coefficient * theta of before the move from the parameters of members that moved."""
        places = sorted(self.moved)
        for p, saved, c in zip(self.params, self._saved, coefficients, strict=True):
            if places and any(c[b] != 0 for b in places):
                each = torch.tensor([c[b] for b in places], dtype=p.dtype, device=p.device)
                p[places] -= each.view(-1, *[1] * (p.dim() - 1)) * saved[places]

    def _apply(self) -> None:
        start = 0
        for p, saved, size in zip(self.params, self._saved, self._sizes, strict=True):
            part = self._moves[:, start : start + size]
            # A member that has not moved loses 0: that is exact.
            torch.sub(saved, part.view(p.shape) if part.is_contiguous() else part.reshape(p.shape), out=p.detach())
            start += size


class OneMember:
    """What `predictions` asks of a Move, for one member."""

    def __init__(self, move: MembersMove, b: int):
        self._move, self._b = move, b
        rates = move.rates(b)
        self.one_rate = rates[0] if rates.count(rates[0]) == len(rates) else None

    def scaled(self, direction: torch.Tensor) -> torch.Tensor:
        """The direction, each parameter's part times its learning rate, (P,)."""
        return self._move.scaled(self._b, direction)
