"""The closure at trial points."""

from __future__ import annotations

import math
import re
import warnings
import weakref

import torch
from torch.overrides import TorchFunctionMode

from ..kernels.errors import out_of_memory
from ..linear import code_of, loss_at
from ..parts import Batched
from ..tape import real_size, shaped_as
from .rng_replay import RandomReplay

LARGE_TAPE = 4 << 20   # bytes of activations from which a trial without a tape is worth its detour through Python
SPARED = 1 << 30       # bytes of activations above which the automatic rule does not ask for the residuals of scalar losses
_ROUNDING = 1e3        # times the rounding unit: what the order of sums may change in a loss
# "One of the differentiated Tensors does not require grad", "cannot register a hook on a tensor that doesn't require gradient"
_REFUSED = re.compile("(not|n't) require (a )?grad")


class Evaluator:
    """Runs an optimizer's closures at trial points, and remembers by their code what they allow."""

    def __init__(self):
        self._needs_tape: weakref.WeakSet = weakref.WeakSet()
        self._one_by_one: weakref.WeakSet = weakref.WeakSet()

    def __reduce__(self):
        """Copies learn anew."""
        return Evaluator, ()

    def run(self, closure, params: list[torch.Tensor], tapeless: bool, replay: RandomReplay):
        """What the closure returns at the parameters' present values, with the random numbers of `replay`.

        tapeless: does it compute the same, bit for bit, without a tape, and is the tape large? Then operations meet detached
        aliases of the parameters; gradients stay enabled, for closures that differentiate with respect to their inputs. One
        that differentiates with respect to the parameters is run again with its tape, and so from then on.
        """
        replay.rewind()
        try:
            code = code_of(closure) if tapeless else None
            if code is not None and code not in self._needs_tape:
                try:
                    with Substituted(params, [p.detach() for p in params]), torch.enable_grad():
                        return closure()
                except RuntimeError as error:
                    if not _REFUSED.search(str(error)):
                        raise
                self._needs_tape.add(code)
                replay.rewind()
            if torch.is_grad_enabled():
                return closure()
            with torch.enable_grad():
                return closure()
        finally:
            replay.finish()

    def batches(self, closure) -> bool:
        """Whether `batched` may be tried on this closure: not on one that runs for each of many parts."""
        code = code_of(closure)
        return code is not None and code not in self._one_by_one and not isinstance(closure, Batched)

    def batched(self, closure, params, displacements, replay: RandomReplay, scalar: bool) -> list[float] | None:
        """The losses at theta - e for each displacement e, (P,), infinite where not finite; None where vmap does not serve.

        One run of the closure under torch.func.vmap, on K times the numbers. Closures that vmap refuses (.item(), branches on
        data, operations without a rule) are remembered; a lack of memory is not.
        """
        rows = torch.stack(displacements)
        with torch.no_grad():
            parts = rows.split([real_size(p) for p in params], dim=1)
            points = [p.detach() - shaped_as(p, part) for p, part in zip(params, parts, strict=True)]

        def loss(*points):
            with Substituted(params, points), torch.enable_grad():
                result = closure()
            return loss_at(result, scalar)

        replay.rewind()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")   # of operations that vmap takes one by one
                found = torch.func.vmap(loss, randomness="same")(*points).double().tolist()
        except Exception as error:   # noqa: BLE001 - what the closure itself raises, it raises again point by point
            if not out_of_memory(error):
                self._one_by_one.add(code_of(closure))
            return None
        finally:
            replay.finish()
        return [value if math.isfinite(value) else math.inf for value in found]

    def agrees(self, closure, batched: float, alone: float, loss: torch.Tensor) -> bool:
        """Whether a loss of `batched` is the closure's own; if not, it is no longer asked for. loss: before the step."""
        size = max(abs(float(loss)), abs(alone))
        same = batched == alone or abs(batched - alone) <= _ROUNDING * torch.finfo(loss.dtype).eps * size
        if not same:
            self._one_by_one.add(code_of(closure))
        return same


class Substituted(TorchFunctionMode):
    """Every operation takes `points` in place of `params`, which it knows by identity; in this thread alone."""

    def __init__(self, params, points):
        super().__init__()
        self._points = {id(p): point for p, point in zip(params, points, strict=True)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run the operation on the points."""
        return function(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, value):
        if isinstance(value, torch.Tensor):
            return self._points.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)([self._replaced(v) for v in value])
        if type(value) is dict:
            return {key: self._replaced(v) for key, v in value.items()}
        return value


def restore_modes(before: tuple[bool, int]) -> None:
    """Go back to the modes of before: an interruption at the end of a `with` leaves its context entered.

    before: whether gradients were enabled, and how many modes for functions there were.
    """
    while torch._C._len_torch_function_stack() > before[1]:
        torch._C._pop_torch_function_stack()
    torch._C._set_grad_enabled(before[0])
