"""What the parts of a step are predicted to cost: from counts and sizes, so that every machine decides alike."""

from __future__ import annotations

from typing import NamedTuple

from ..solve import CG, Solution, operations

# In operations of a large matrix product, of which a core does some 5e10 a second: what Python and PyTorch spend on a call of
# the core or a run of a closure, and on each of a closure's operations; what a sweep takes for an operation of its narrow
# products, and for a number that it holds; a run of the closure in sweeps, without a tape and with one.
_CALL, _NODE = 4e6, 3e5
_NARROW, _NUMBER = 2.0, 40.0
_RUN, _TAPED = 1.5, 2.0
_REMEMBERED = 64          # of one structure


class StepCost(NamedTuple):
    """Predicted operations of a step's parts.

    linearize: run the closure, read its tape, build the matrix. attempt: one damping; trial: one run of the closure. round: of
    a correction, its run included.
    """

    linearize: float
    attempt: float
    trial: float
    round: float

    def of(self, attempts: int, trials: int) -> float:
        """A step with so many attempts, and runs of the closure after the first, of which corrections take all but one each."""
        return self.linearize + attempts * (self.attempt + self.trial) + max(trials - attempts, 0) * self.round


def step_cost(lin, solution: Solution, options: CG) -> StepCost:
    """The cost of a step by this solution's solver. Remembered with the linearization's structure."""
    choices, key = getattr(lin, "choices", None), ("cost", solution.solver, solution.iterations)
    if choices is None:   # the reference, by an explicit J
        M, P = lin.num_residuals, lin.num_parameters
        return StepCost(M * P * min(M, P), min(M, P) ** 3 / 2, M * P, 3 * M * P)
    found = choices.get(key)
    if found is None:
        if len(choices) >= _REMEMBERED:
            choices.clear()
        found = choices[key] = _predicted(lin, solution, options)
    return found


def _predicted(lin, solution: Solution, options: CG) -> StepCost:
    kernels = lin.kernels()
    sweep = _NARROW * kernels.flops + _NUMBER * (kernels.swept or kernels.arena_size)
    matrix, damping = operations(lin, solution.solver, solution.iterations, options)
    run = _CALL + _NODE * lin.nodes
    trial = run + _RUN * sweep
    again = damping if solution.iterations else 2 * min(lin.num_residuals, lin.num_parameters) ** 2
    return StepCost(
        run + _TAPED * sweep + matrix, _CALL + damping + sweep, trial, trial + _CALL + 2 * sweep + again
    )
