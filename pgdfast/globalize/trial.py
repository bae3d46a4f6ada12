"""Losses at trial points, without the tape that nobody would read."""

from __future__ import annotations

import re
import weakref

import torch

# "One of the differentiated Tensors does not require grad", "cannot register a hook on a tensor that doesn't require gradient"
_REFUSED = re.compile("(not|n't) require (a )?grad")
# Code of closures that were refused.
_need_tape: weakref.WeakSet = weakref.WeakSet()


def trial_loss(closure, params: list[torch.Tensor], tapeless: bool) -> float:
    """The loss at the parameters' present values, bit for bit that of a run with a tape.

    tapeless: do the closure's kernels not depend on which tensors require gradients (Linearization.tapeless)? Then the
    parameters do not require them for this run. Gradients stay enabled, for closures that differentiate with respect to
    their inputs. A closure that autograd refuses, because it differentiates with respect to the parameters, is run again
    with its tape, from the same random numbers, and so from then on. Anything else that it raises is the caller's.
    """
    return _loss(run_trial(closure, params, tapeless))


def trial_residual(closure, params: list[torch.Tensor], lin) -> tuple[float, torch.Tensor]:
    """(loss, residual) at the parameters' present values, comparable with those of a linearisation of the closure."""
    tapeless = lin.tapeless and not lin.residuals_need_tape
    return lin.residual_at(lambda: run_trial(closure, params, tapeless))


def run_trial(closure, params: list[torch.Tensor], tapeless: bool):
    """What the closure returns, run as `trial_loss` runs it."""
    code = _code(closure)
    if not tapeless or code is None or code in _need_tape:
        return _result(closure)
    random = _random_state(params[0].device)
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
    _restore(random)
    return _result(closure)


def _result(closure):
    with torch.enable_grad():
        return closure()


def _loss(result) -> float:
    if isinstance(result, torch.Tensor) and result.dim() == 0:
        return result.item()
    parts = result if isinstance(result, (tuple, list)) else [result]
    return 0.5 * sum(float(part.detach().double().square().sum()) for part in parts)


def _code(closure):
    """What stays the same of a function that is defined anew for every step; None for what is not written in Python."""
    return getattr(closure, "__code__", None) or getattr(type(closure).__call__, "__code__", None)


def _random_state(device: torch.device) -> tuple:
    return device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(state: tuple) -> None:
    device, cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
