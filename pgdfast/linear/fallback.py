"""Where the rules give way to autograd: for an operation without one, and for those that autograd does not bear out."""

from __future__ import annotations

import warnings

from .adjoint import Flat, disagreement
from .announce import depth_of_caller, rules_disagree
from .double_backward import DoubleBackward, Learned, double_backward

_STRUCTURES_KEPT = 64


class Arbiter:
    """Decides for the tapes of one linearizer, and remembers what it learnt of structures without a program.

    check: as for linearize.
    """

    def __init__(self, params, tracer, check: str):
        self._params, self._tracer, self.check = params, tracer, check
        self._learned: dict[int, Learned] = {}
        self._accusation = ""   # of rules; said once autograd has borne it out

    def agrees(self, plan, products: Flat, trace, result) -> bool:
        """Whether a plan's products are those of autograd; the plan remembers it."""
        if plan.agrees is None and self.check != "never":
            found = disagreement(products, trace, self._params, result)
            plan.release()
            if found is not None:
                names = trace.structure.suspects(set(found.parameters) or set(range(len(self._params))))
                self._accusation = rules_disagree(names, found.parameters, self._params)
                plan.agrees = False
            elif self.check == "first":
                plan.agrees = True
        return plan.agrees is not False

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
