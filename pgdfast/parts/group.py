"""What is asked of the processes that share a problem: here of one that has it alone."""

from __future__ import annotations

import contextlib

import torch


class Alone:
    """One process: every question is answered by what it has."""

    rank, size, words = 0, 1, 0

    def start(self, params: list[torch.Tensor]) -> None:
        """Begin a step: `words` are counted from here."""

    def total(self, t: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return t

    def gather(self, t: torch.Tensor) -> list[torch.Tensor]:
        """Every process's tensor, of which the first dimension may differ."""
        return [t]

    def joined(self, t: torch.Tensor) -> torch.Tensor:
        """Every process's tensor, one behind the other."""
        return t

    def objects(self, value) -> list:
        """Every process's small value."""
        return [value]

    def least(self, number: float) -> float:
        """The smallest number of any process."""
        return number

    def same(self, t: torch.Tensor) -> torch.Tensor:
        """The first process's tensor."""
        return t

    def settle(self, error: BaseException | None = None) -> None:
        """Raise where a process has failed."""
        if error is not None:
            raise error

    @contextlib.contextmanager
    def section(self):
        """Work of this process alone, whose failure is everybody's."""
        yield


def chosen_group(process_group) -> Alone:
    """The group of an option of LM, None for one process."""
    return Alone()
