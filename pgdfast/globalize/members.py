"""The parameters of an ensemble moved member by member, each along its own direction."""

from __future__ import annotations

import torch


class MembersMove:
    """theta_b - t_b (rates_b * d_b) for stacked parameters, with a copy to return to.

    params: tensors with the B members first. rates: per parameter, the B learning rates. moved: the members that are away.
    """

    def __init__(self, params: list[torch.Tensor], rates: list[list[float]]):
        self.params, self.count = params, len(params[0])
        self._sizes = [p.numel() // self.count for p in params]
        self._rates = rates
        self._shared = all(each is rates[0] or each == rates[0] for each in rates)   # by all parameters of a member
        self._saved: list[torch.Tensor] | None = None
        self.moved: set[int] = set()

    def save(self) -> None:
        """Copy the parameters, so that members can return to them."""
        self._saved = [p.detach().clone() for p in self.params]

    def one_rate(self, b: int) -> float | None:
        """Member b's learning rate, None where its parameters have several."""
        return self._rates[0][b] if self._shared or len({each[b] for each in self._rates}) == 1 else None

    def of(self, b: int) -> OneMember:
        """Member b, as solvers' predictions want to see it."""
        return OneMember(self, b)

    def scaled(self, b: int, direction: torch.Tensor) -> torch.Tensor:
        """Member b's direction, each parameter's part times its learning rate, (P,)."""
        parts = direction.split(self._sizes)
        return torch.cat([each[b] * part for each, part in zip(self._rates, parts, strict=True)])

    def to(self, directions: dict[int, torch.Tensor], lengths: dict[int, float], steps: torch.Tensor | None = None) -> None:
        """Put these members at theta - t (rates * d); the others stay where they are.

        directions: d, (P,), by member; lengths: t. steps: the directions of all members, (B, P), where there is such a tensor.
        """
        self.back(directions)
        members = sorted(directions)
        if steps is None or len(members) < self.count:
            steps = torch.stack([directions[b] for b in members])
        for k, (p, part) in enumerate(zip(self.params, steps.split(self._sizes, 1), strict=True)):
            each = self._rates[k]
            self._subtract(p, members, part, [each[b] * lengths[b] for b in members])
        self.moved |= directions.keys()

    @torch.no_grad()
    def _subtract(self, p: torch.Tensor, members: list[int], part: torch.Tensor, factors: list[float]) -> None:
        rows, part = p.detach().view(self.count, -1), part.to(p.dtype)
        same = factors.count(factors[0]) == len(factors)
        if not same:
            part = part * torch.tensor(factors, dtype=p.dtype, device=p.device)[:, None]
        alpha = -factors[0] if same else -1.0
        if len(members) == self.count:
            rows.add_(part, alpha=alpha)
        else:
            rows.index_add_(0, torch.tensor(members, device=p.device), part, alpha=alpha)

    @torch.no_grad()
    def back(self, members) -> None:
        """Return these members to where they were, bit for bit."""
        members = [b for b in members if b in self.moved]
        if not members:
            return
        self.moved -= set(members)
        if not self.moved:
            self.all_back()
            return
        places = torch.tensor(members, device=self.params[0].device)
        for p, saved in zip(self.params, self._saved, strict=True):
            p.detach().index_copy_(0, places, saved.index_select(0, places))

    @torch.no_grad()
    def all_back(self) -> None:
        """Return all members to where they were, bit for bit."""
        if self._saved is not None:
            for p, saved in zip(self.params, self._saved, strict=True):
                p.copy_(saved)
        self.moved = set()

    @torch.no_grad()
    def set_aside(self) -> list[torch.Tensor] | None:
        """Return all members, to be brought `again` where they are now; None where none has moved."""
        if not self.moved:
            return None
        there = [p.detach().clone() for p in self.params]
        for p, saved in zip(self.params, self._saved, strict=True):
            p.copy_(saved)
        return there

    @torch.no_grad()
    def again(self, there: list[torch.Tensor] | None) -> None:
        """Undo `set_aside`."""
        if there is not None:
            for p, value in zip(self.params, there, strict=True):
                p.copy_(value)

    @torch.no_grad()
    def decay(self, coefficients: list[list[float]]) -> None:
        """Subtract coefficient * theta of before the move from the parameters of members that moved."""
        places = sorted(self.moved)
        for p, saved, c in zip(self.params, self._saved, coefficients, strict=True):
            if places and any(c[b] != 0 for b in places):
                each = torch.tensor([c[b] for b in places], dtype=p.dtype, device=p.device)
                p[places] -= each.view(-1, *[1] * (p.dim() - 1)) * saved[places]


class OneMember:
    """What `predictions` asks of a Move, for one member."""

    def __init__(self, move: MembersMove, b: int):
        self._move, self._b, self.one_rate = move, b, move.one_rate(b)

    def scaled(self, direction: torch.Tensor) -> torch.Tensor:
        """The direction, each parameter's part times its learning rate, (P,)."""
        return self._move.scaled(self._b, direction)
