"""The kernels of one program with its row structure."""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels.scaled import row_scaled
from .chained import Chained
from .rows import RowLayout, row_layout
from .separation import Separation, separation

UNKNOWN = object()   # a row layout that nobody has asked for
_SEARCHES, _SEARCH = 3, 5e5   # searches for rows at other positions; what one takes per instruction, in operations of products


class Plan:
    """Kernels of one program with its row structure, shared by all linearizations of that structure.

    bound: the list of constants that the kernels hold, None for none. row_scale: what their rows of J are multiplied with,
    None for ones. layout: that of the rows, or UNKNOWN; the kernels may be others once it is known. choices: see
    SolvableLinearization. live: see live.py. agrees: with autograd's gradient, None where
    that is to be looked at. hides: were constants that are not finite behind what a `where` does not take? searches: for rows
    at other positions, by kinds of instructions: of all plans of a linearizer, since masks take other numbers of elements.
    """

    __slots__ = (
        "_asked", "_backend", "_base", "_device", "_member", "_separation", "_whole", "_wide", "agrees", "bound", "choices",
        "hides", "kernels", "layout", "live", "mixing", "program", "row_scale", "searches", "_plain",
    )
    chains = True   # may the kernels be those of a chain?

    def __init__(self, program, device, backend, dtype=None, base=None):
        self.program, self._device, self._backend, self._base = program, device, backend, base
        self._whole = kernels.kernels_for(program, device, backend, dtype)
        self.kernels = self._plain = self._whole   # _plain: those that are scaled, or scale themselves
        self._separation: Separation | None = None
        self.row_scale = None
        self.bound = self._member = self._wide = self._asked = None   # _member: of an ensemble, the one selected
        self.mixing = program.positions_that_mix()
        self.layout, self.choices, self.live, self.agrees, self.hides = UNKNOWN, {}, None, None, False
        self.searches: dict[tuple, int] = {}

    def bind(self, constants, member: int | None = None, row_scale: torch.Tensor | None = None):
        """The kernels with these constants and this row scale, of one member where these are an ensemble's."""
        if self.bound is not constants or self.row_scale is not row_scale:
            self.bound = self._member = None   # until it is done
            if row_scale is not None and self._plain.scales_rows:
                self._plain.bind(constants, row_scale)
            else:
                self._plain.bind(constants)
            self.kernels = row_scaled(self._plain, row_scale)
            self.bound, self.row_scale = constants, row_scale
        if member is not None and self._member != member:
            self._member = None
            self.kernels.select(member)
            self._member = member
        return self.kernels

    def row_layout(self, constants) -> RowLayout | None:
        """The row layout, found when first asked for; None if the residuals do not separate.

        Where a gather reads the workspace it depends on the positions, and is found anew when those change; where they change
        at every step, and J of few columns takes less than to find rows, there are none.
        """
        if self.layout is not UNKNOWN and not self.mixing:
            return self.layout
        asked = [constants[k] for k in self.mixing]
        if self.layout is UNKNOWN or any(not torch.equal(a, b) for a, b in zip(asked, self._asked, strict=True)):
            found = self._separated(constants)
            self.layout = UNKNOWN   # until the kernels have it
            self._take(found)
            self._asked = [a.clone() for a in asked]
            self.layout, self._separation = found.layout, found
            self.choices.clear()
        return self.layout

    def coupling(self, constants) -> str:
        """Why the residuals do not separate into rows, and what to do; "" where they do."""
        self.row_layout(constants)
        return self._separation.reason if self.layout is None else ""

    def _separated(self, constants) -> Separation:
        if self._base is None:
            if self.mixing:
                kinds = tuple([op.kind for op in self.program.instructions])
                self.searches[kinds] = self.searches.get(kinds, 0) + 1
                if self.searches[kinds] > _SEARCHES and self._cheap():
                    return Separation(None)
            before = self._separation
            if before is not None and before.layout is None:   # with other positions, too, but for what the strict pass finds
                return Separation(row_layout(self.program, constants), None, before.reason)
            # Chains make tensors from numbers as they go, which a captured step on a GPU cannot.
            chains = self.chains and self._whole.has_columns and self._device.type == "cpu"
            return separation(self.program, constants, chains)
        self._base.row_layout(constants)
        return self._base._separation

    def _cheap(self) -> bool:
        """Whether J by products takes less than to find rows."""
        whole = self._whole
        few = min(whole.num_residuals, whole.num_parameters)
        products = self._device.type == "cpu" and whole.fused and whole.has_columns
        return products and few * whole.flops < _SEARCH * len(self.program.instructions)

    def _take(self, found: Separation) -> None:
        """Let the kernels be those of these rows."""
        chained = None
        if found.chain is not None:
            dtype = self._whole.dtype
            chained = Chained(
                self._whole, found.chain,
                lambda program: kernels.kernels_for(program, self._device, self._backend, dtype),
            )
            if self.bound is not None:
                chained.adopt(self.bound)
        else:
            self._whole.set_rows(found.layout)
        self.kernels = self._plain = chained or self._whole
        if self.bound is not None and self.row_scale is not None:   # others scale in another way
            bound, self.bound = self.bound, None
            self.bind(bound, row_scale=self.row_scale)

    def release(self, constants=None, wide: bool = True) -> None:
        """Let go of the constants that are bound, of these alone where given; `wide`: the plan in float64, too."""
        if self.bound is not None and (constants is None or self.bound is constants):
            self.bound = None
            self.kernels.release()
        if wide and self._wide is not None:
            self._wide.release(constants)

    @property
    def wide(self) -> Plan:
        """The same program in float64, over constants of the program's own dtype; made when first asked for."""
        if self._wide is None:
            self._wide = self._widened()
        return self._wide

    def _widened(self) -> Plan:
        return Plan(self.program, self._device, self._backend, torch.float64, self)
