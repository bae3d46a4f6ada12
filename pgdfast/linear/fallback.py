"""Where the rules give way to autograd: for an operation without one, and for those that autograd does not bear out."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch

from .adjoint import disagreement
from .announce import depth_of_caller, rules_disagree
from .double_backward import DoubleBackward, Learned, double_backward

_STRUCTURES_KEPT = 64


def _finite(trace):
    """The trace with zeros for constants that are not finite; None where all are."""
    constants, changed = list(trace.constants), False
    for k, c in enumerate(constants):
        if isinstance(c, torch.Tensor):
            if c.is_floating_point() and not bool(c.isfinite().all()):
                once = c.detach()[tuple([slice(None) if stride else slice(1) for stride in c.stride()])]
                numbers = torch.empty_strided(once.shape, once.stride(), dtype=c.dtype, device=c.device)
                numbers.copy_(once.nan_to_num(0.0, 0.0, 0.0))   # in the layout that the program knows
                constants[k], changed = numbers.as_strided(c.shape, c.stride()), True
        elif not math.isfinite(c):
            constants[k], changed = 0.0, True
    return replace(trace, constants=constants) if changed else None


class Arbiter:
    """Decides for the tapes of one linearizer, and remembers what it learnt of structures without a program.

    check: as for linearize.
    """

    def __init__(self, params, tracer, check: str):
        self._params, self._tracer, self.check = params, tracer, check
        self._learned: dict[int, Learned] = {}
        self._accusation = ""   # of rules; said once autograd has borne it out

    def judged(self, plan, found, linearize, trace, result):
        """A trace's linearization where its products are those of autograd, else None; the plan remembers it.

        linearize: makes one of another trace of that structure.

        Autograd's `where`, and every other operation that takes some of several numbers, drops what is not finite behind a
        number that it does not take, where a product with zero does not. Then numbers in place of those constants do no harm.
        """
        if plan.agrees is None and self.check != "never":
            wrong = disagreement(found.flat(), trace, self._params, result)
            plan.release()
            clean = _finite(trace) if wrong is not None and wrong.finite else None
            if clean is not None:
                found = linearize(clean)
                wrong = disagreement(found.flat(), clean, self._params, result)
                plan.release()
                plan.hides = wrong is None
            if wrong is not None:
                names = trace.structure.suspects(set(wrong.parameters) or set(range(len(self._params))))
                self._accusation = rules_disagree(names, wrong.parameters, self._params)
                plan.agrees = False
            elif self.check == "first" and not plan.hides:
                plan.agrees = True
        return found if plan.agrees is not False else None

    def trace(self, result, allow_sync: bool = True):
        """What a closure returned, read without rules, where they do not agree."""
        return self._tracer.trace(result, allow_sync, rules=False)

    def operator(self, trace, result, count: int = 1) -> DoubleBackward:
        """The products of a trace without a program, compared with the gradient as the case may be.

        Announces rules that do not agree. Raises ValueError as double_backward does.
        """
        accusation, self._accusation = self._accusation, ""
        number = trace.structure.number
        learned = self._learned.get(number)
        if learned is None:
            learned = Learned()
            if number >= 0:
                if len(self._learned) >= _STRUCTURES_KEPT:
                    self._learned.clear()
                self._learned[number] = learned
        operator = double_backward(trace, self._params, self._tracer.dtype, result, learned, self.check, count)
        if accusation:
            warnings.warn(accusation, stacklevel=depth_of_caller())
        return operator
