"""The door to the two ways to a step: the fast path, and the reference that it is checked against.

Both linearize a closure and hand back what one step of LM asks of the network, or networks, that it trains (networks.py).
"""

from __future__ import annotations

from operator import is_

import torch

from . import kernels
from .linear import EnsembleLinearizer, Linearization, Linearizer
from .networks import ManyNetworks, NetworkInParts, OneNetwork
from .parts import Alone, Batched, Parts, PartsLinearizer
from .reference_backend import Reference
from .solve import solve


class Fast:
    """Tape, plans and kernels. group, memory: of parts, see parts.PartsLinearizer."""

    def __init__(self, backend: str, check: str = "first", group=None, memory: float | None = None):
        self.name, self.check, self.group, self.memory = backend, check, group or Alone(), memory
        self._linearizer = self._parameters = self._by_parts = None

    def __reduce__(self):
        """Copies start without plans, which belong to the original's parameters."""
        return Fast, (self.name, self.check, None, self.memory)

    def linearize(self, closure, params: list[torch.Tensor]) -> Linearization:
        """Linearize one network, keeping plans while the parameters stay the same tensors."""
        current = self._linearizer
        if current is None or len(current.params) != len(params) or not all(map(is_, current.params, params)):
            self._linearizer, self._parameters, self._by_parts = Linearizer(params, self.name, self.check), None, None
        return self._in_parts(closure) if isinstance(closure, Batched) else self._linearizer(closure)

    def _in_parts(self, closure: Batched) -> Parts:
        if self._by_parts is None:
            self._by_parts = PartsLinearizer(self._linearizer.params, self.name, self.check, self.group, self.memory)
        return self._by_parts(closure)

    def networks(self, closure, parameters) -> OneNetwork | ManyNetworks:
        """The networks of a closure over a step.parameters.Parameters. Cost: one run of the closure."""
        if self._parameters is not parameters:
            if parameters.stacked:
                self._linearizer = EnsembleLinearizer(parameters.params, parameters.count, self.name, self.check)
            else:
                self._linearizer = Linearizer(parameters.params, self.name, self.check)
            self._parameters, self._by_parts = parameters, None
        if isinstance(closure, Batched):
            return NetworkInParts(self._in_parts(closure), solve)
        lin = self._linearizer(closure)
        return ManyNetworks(lin) if parameters.stacked else OneNetwork(lin, solve)


def backend(name: str, check: str = "first", group=None, memory: float | None = None):
    """The backend of a name, after PGDFAST_BACKEND; the rest as for Fast, of which the reference has no need.

    Raises ValueError or RuntimeError as pgdfast.kernels.requested does.
    """
    name = kernels.requested(name)
    return Reference() if name == "reference" else Fast(name, check, group, memory)
