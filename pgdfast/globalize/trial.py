"""Trial points: on the batch of the linearisation, without the tape that nobody would read."""

from __future__ import annotations

import math
import re
import weakref

import torch

from .draws import Draws, Generators, code_of

# "One of the differentiated Tensors does not require grad", "cannot register a hook on a tensor that doesn't require gradient"
_REFUSED = re.compile("(not|n't) require (a )?grad")
# Code of closures that were refused.
_need_tape: weakref.WeakSet = weakref.WeakSet()


class Trials:
    """The closure of a step at other parameters, with the random numbers of its linearisation.

    closure, lin, draws, move: as in LM's step; move must have saved its parameters where anything is to be evaluated, and draws
    may be None where nothing is. count: runs of the closure.
    """

    def __init__(self, closure, lin, draws: Draws | None, move):
        self.lin, self.move, self.count = lin, move, 0
        self.closure, self._draws = closure, draws
        self._solution = self._last = self._known = None

    def along(self, direction: torch.Tensor, t: float = 1.0) -> float:
        """Go to theta - t (rates * d), d (P,), and stay: the loss there. Cost: one run of the closure, unless it is known."""
        self.move.to(direction, t)
        if self._known is not None and direction is self._known[0] and t == 1.0:
            return self._known[1]
        self.count += 1
        with self._draws:
            return trial_loss(self.closure, self.move.params, self.lin.tapeless, self._draws)

    def know(self, direction: torch.Tensor, loss: float) -> None:
        """Take this for the loss at theta - rates * d, until told of another."""
        self._known = direction, loss

    def replayed(self) -> Draws:
        """A context with the random numbers of the linearisation, for one more run of the closure."""
        self.count += 1
        return self._draws

    # For corrections, which need residuals (globalize/acceleration.py). The parameters return to those of the linearisation.

    def of(self, solution) -> Trials:
        """Correct with the matrix of this solution from now on."""
        self._solution = solution
        return self

    def at(self, e: torch.Tensor) -> float:
        """The loss at theta - e, for e (P,), or as far that way as the norm constraint goes. Cost: one run of the closure."""
        self.count += 1
        e = self.move.shift(e)
        with self._draws:
            loss, residual = trial_residual(self.closure, self.move.params, self.lin, self._draws)
        self.move.undo()
        self.lin.parameters_unchanged()
        self._last = e, residual
        return loss

    def missed(self) -> torch.Tensor:
        """What the linear model missed at the last point, r(theta - e) - r + J e, (M,). Cost: one product with J."""
        e, residual = self._last
        return residual - self.lin.residual + self.lin.jvp(e)

    def correction(self, m: torch.Tensor) -> torch.Tensor:
        """A^-1 J^T m, (P,), each group's part times its learning rate over the largest: at rate 0 nothing moves.

        Cost: two triangular solves and one product with J^T.
        """
        correction, move = self._solution.solve_with_same_factor(m), self.move
        return correction if move.one_rate is not None else move.scaled(correction) / max(move.rates)

    def size(self, e: torch.Tensor) -> float:
        """The length of a displacement in the norm of D."""
        D, e = self._solution.damping_diagonal, e.double()
        scaled = isinstance(D, torch.Tensor) and bool(D.any())   # mu = 0 has no norm of its own
        return math.sqrt(float(torch.dot(D.double() * e if scaled else e, e)))


def trial_loss(closure, params: list[torch.Tensor], tapeless: bool, draws: Draws | None = None) -> float:
    """The loss at the parameters' present values, bit for bit that of a run with a tape.

    tapeless: do the closure's kernels not depend on which tensors require gradients (Linearization.tapeless)? Then the
    parameters do not require them for this run. Gradients stay enabled, for closures that differentiate with respect to
    their inputs. A closure that autograd refuses, because it differentiates with respect to the parameters, is run again
    with its tape, from the same random numbers (those of `draws`, where the caller has gone back to them), and so from then
    on. Anything else that it raises is the caller's.
    """
    return _loss(run_trial(closure, params, tapeless, draws))


def trial_residual(closure, params: list[torch.Tensor], lin, draws: Draws) -> tuple[float, torch.Tensor]:
    """(loss, residual) at the parameters' present values, comparable with those of a linearisation of the closure."""
    tapeless = lin.tapeless and not lin.residuals_need_tape
    return lin.residual_at(lambda: run_trial(closure, params, tapeless, draws))


def run_trial(closure, params: list[torch.Tensor], tapeless: bool, draws: Draws | None):
    """What the closure returns, run as `trial_loss` runs it."""
    code = code_of(closure)
    if not tapeless or code is None or code in _need_tape:
        return _result(closure)
    draws = draws or Generators().draws(closure, params[0].device)
    try:
        for p in params:
            p.requires_grad_(False)
        return _result(closure)
    except RuntimeError as error:
        if not _REFUSED.search(str(error)):
            raise
    finally:
        for p in params:
            p.requires_grad_(True)
    _need_tape.add(code)
    draws.rewind()
    return _result(closure)


def _result(closure):
    with torch.enable_grad():
        return closure()


def _loss(result) -> float:
    if isinstance(result, torch.Tensor) and result.dim() == 0:
        return result.item()
    parts = result if isinstance(result, (tuple, list)) else [result]
    return 0.5 * sum(float(part.detach().double().square().sum()) for part in parts)
