"""Losses at trial points, without the tape that nobody would read."""

from __future__ import annotations

import re
import weakref

import torch

from .draws import Draws, Generators, code_of

# "One of the differentiated Tensors does not require grad", "cannot register a hook on a tensor that doesn't require gradient"
_REFUSED = re.compile("(not|n't) require (a )?grad")
# Code of closures that were refused.
_need_tape: weakref.WeakSet = weakref.WeakSet()


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
