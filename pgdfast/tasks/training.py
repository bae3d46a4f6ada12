"""The training loop, its clock, and what it hands back."""

import contextlib
import copy
import time
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Run:
    """One optimizer, one seed.

    Attributes:
        optimizer: name of the method.
        seed: seed of the initial weights.
        columns: measured quantities by name, each of shape (T + 1,): before the first step, and
            after each of the T steps.
        step_seconds: wall time of each step, shape (T + 1,); NaN at 0, where no step was taken.
        stopped_at: the step after which the measured values were no longer finite, or None.
            The columns are NaN from the step after it on.

    """

    optimizer: str
    seed: int
    columns: dict[str, np.ndarray]
    step_seconds: np.ndarray
    stopped_at: int | None = None

    @property
    def steps(self):
        """T, the number of steps."""
        return len(self.step_seconds) - 1

    @property
    def step_ms(self):
        """Median wall time of a step, in milliseconds (NaN without a step)."""
        taken = self.step_seconds[np.isfinite(self.step_seconds)]
        return 1e3 * float(np.median(taken)) if taken.size else float("nan")


def train(name, seed, optimizer, closure, measure, columns, steps, advance=lambda: None):
    """Take `steps` steps and measure before the first and after each.

    The clock runs during `optimizer.step(closure)` alone: forward, backward or linear solve, and
    update; `measure()` is not timed. A run whose values stop being finite ends there.

    Args:
        name: name of the method, handed on to the `Run`.
        seed: seed of the initial weights, handed on likewise.
        optimizer: a torch.optim.Optimizer.
        closure: what its `step` takes.
        measure: returns one row of numbers, in the order of `columns`.
        columns: their names.
        steps: T.
        advance: called after each step, for a progress bar.

    """
    table = np.full((steps + 1, len(columns)), np.nan)
    seconds = np.full(steps + 1, np.nan)
    stopped_at = None
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for below
        table[0] = measure()
        for step in range(1, steps + 1):
            seconds[step] = _timed_step(optimizer, closure)
            table[step] = measure()
            advance()
            if not np.isfinite(table[step]).all():
                stopped_at = step
                break
    values = {column: table[:, index] for index, column in enumerate(columns)}
    return Run(name, seed, values, seconds, stopped_at)


def least_squares_closure(optimizer, residual, second_order):
    """Return the closure of a least-squares problem for `optimizer`.

    LM takes the residual tensor itself, hence L = 1/2 sum r^2. A first-order optimizer gets the
    gradient of 1/2 mean r^2, so that its learning rate does not depend on the number of points.
    """
    if second_order:
        return residual

    def closure():
        optimizer.zero_grad()
        loss = residual().square().mean() / 2
        loss.backward()
        return loss

    return closure


def adam_step_ms(model, residual, lr, steps=50, warm_up=5):
    """Return the median wall time, in milliseconds, of an Adam step on a copy of `model`.

    Args:
        model: the network; it is not changed.
        residual: function of a model, returning its residual tensor.
        lr: Adam's learning rate.
        steps: timed steps.
        warm_up: steps before them, not timed.

    """
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(twin.parameters(), lr=lr)
    closure = least_squares_closure(optimizer, lambda: residual(twin), second_order=False)
    seconds = [_timed_step(optimizer, closure) for _ in range(warm_up + steps)]
    return 1e3 * float(np.median(seconds[warm_up:]))


@contextlib.contextmanager
def torch_threads(count):
    """Run PyTorch with `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed_step(optimizer, closure):
    start = time.perf_counter()
    optimizer.step(closure)
    return time.perf_counter() - start
