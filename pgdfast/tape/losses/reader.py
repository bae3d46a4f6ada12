"""The form of a scalar: term by term, each by the first way that serves it.

1. walk: squares and cross-entropies that the tape shows as such (squares.py, classification.py); the core repeats those.
2. cut: one quantity that the term folds at 0, whatever its operations (tail.py, curvature.py).
3. monotone: phi(S), read as phi'(S) S: the second derivative of phi is dropped.
4. link: a cut at a quantity of which the term makes probabilities, or the like.
5. split: a linear operation hands its weight to its inputs, which are terms of their own.
6. convex: a cut at any quantity of which the term is a convex function.
7. chosen: slopes that torch.where chooses, of a quantity that is not saved; its mean size follows from the loss's value.
8. scale: a loss times another, each with the other for its weight; or a loss times, or divided by, a quantity that is learned
   beside it (scales.py). slope: what is linear there.
"""

from __future__ import annotations

import torch

from . import classification, monotone, robust, squares  # noqa: F401 - their readers register themselves
from .blocks import COUPLED, Diagonal, Fork, Form, IndefiniteForm, Route, UnrecognizedLoss, diagonal_block, looked_at
from .classification import softmax_blocks
from .curvature import accepted, is_centred
from .linear import READERS, Walk, is_linear
from .names import leads_nowhere
from .scales import Slope, factors, logarithm, settle
from .tail import LINKS, REDUCTIONS, UNDIFFERENTIABLE, Cut, Tail, cuts

RECOGNISED = (
    "Return the residual tensor (or a tuple of them), or use one of: F.mse_loss, a sum or mean of squares, F.cross_entropy, "
    "F.binary_cross_entropy_with_logits, F.huber_loss, an l1 or quantile loss, any other sum of convex functions of what the "
    "model computes, its root or logarithm, or a weighted sum of those with positive weights."
)
_LOSSES = frozenset({
    "MseLossBackward0", "NllLossBackward0", "NllLoss2DBackward0", "LogSoftmaxBackward0",
    "BinaryCrossEntropyWithLogitsBackward0", "HuberLossBackward0", "SmoothL1LossBackward0", "BinaryCrossEntropyBackward0",
    "SoftMarginLossBackward0", "VarBackward0",
})
_SECOND_DEGREE = {
    "PowBackward0", "MulBackward0", "DotBackward0", "VdotBackward0", "MmBackward0", "MvBackward0", "BmmBackward0",
    "AddmmBackward0", "VarBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0",
}
_WAYS = ("walk", "cut", "monotone", "link", "split", "convex", "chosen", "scale", "slope")
_OF_A_SUM = ("walk", "cut", "monotone", "split")   # below phi(S) and scales: what the model computes is no part of S
_DEEPEST = 8   # cuts that are looked at


def scalar_form(tape, root: int, allow_sync: bool = True, value: torch.Tensor | None = None) -> Form:
    """The form of the scalar at a tape position.

    allow_sync: may this wait for a device? If not, numbers on one stay there, and signs of weights there are not looked at.
    value: what the scalar is, where that is at hand.
    Raises: UnrecognizedLoss naming the operation that fits none of the forms.
    """
    ways = tape.structure.losses
    if ways:
        try:
            return _Terms(tape, allow_sync, ways, value=value).read((root, 0))
        except UnrecognizedLoss:   # all anew, if only to explain
            ways.clear()
    try:
        return _walked(tape, (root, 0), 1.0, allow_sync)
    except UnrecognizedLoss as error:
        why = error
    if not _differentiable(tape, root, allow_sync):
        raise why
    try:
        return _Terms(tape, allow_sync, ways, value=value).read((root, 0))
    except UnrecognizedLoss as error:
        ways.clear()
        raise (UnrecognizedLoss(f"{why}, and {error}") if isinstance(error, IndefiniteForm) else why) from None


def one_element(form: Form, tape, value: float | None, params) -> str:
    """What a result of one entry with dimensions is, by its form as a scalar: "loss", "residual", or "either".

    value: its number, None where that is not to be waited for. A loss is a sum of several squares that is all of its value;
    with a constant beside the squares it may be a residual, too. So is what ends in another operation that is one by name.
    """
    named = any(tape.kind(position) in _LOSSES for position in form.consumed)
    if not form.squares_only or not form.sums(tape) and not named:
        return "loss" if named else "residual"
    if value is None:
        return "either"
    half = 0.5 * sum(float(block.residual.double().square().sum()) for block in form.blocks)
    half += 0.5 * sum(c * float(params[k].detach().abs().double().square().sum()) for k, c in form.penalties.items())
    return "loss" if abs(half - value) <= 1e-5 * abs(value) else "either"


def _differentiable(tape, root: int, allow_sync: bool) -> bool:
    device = torch.device("cpu") if tape.leaf[root] >= 0 else tape.nodes[root]._input_metadata[0].device
    return allow_sync or device.type == "cpu"


def _walked(tape, edge, weight, allow_sync: bool, chain=None) -> Form:
    walk = Walk(tape, allow_sync, chain)
    form = walk.read(*edge, weight)
    softmax_blocks(walk)
    return form


class _Terms:
    """Reads a loss as terms. ways: by edge, the way and the cut that served the last time; among: which ways are tried."""

    def __init__(self, tape, allow_sync: bool, ways: dict, among: tuple = _WAYS, value: torch.Tensor | None = None):
        self.tape, self.allow_sync, self.ways, self.among, self.value = tape, allow_sync, ways, among, value
        self.form, self.terms, self.slopes = Form(), {}, {}
        self.chains: dict = {}   # of each term, all by which it is reached; see blocks.Route
        self.outer: list = []    # blocks that were found before these terms
        self.beside: list = []   # (block, its route, slope, chain): of terms that are linear where a block stands

    def read(self, edge, weight=1.0) -> Form:
        """The form of the term at an edge."""
        self.add(*edge, weight)
        form = self.rest()
        for block, route, slope, chain in self.beside:
            block.absorb(slope)
            route.chains += (chain,)
        return form

    def add(self, position: int, output: int, weight, chain=None) -> None:
        """A term more."""
        key = position, output
        self.terms[key] = self.terms[key] + weight if key in self.terms else weight
        self.chains[key] = Fork((*self.chains.get(key, ()), chain))

    def rest(self) -> Form:
        """The form of all terms."""
        while self.terms:
            edge = max(self.terms)
            self._term(edge, self.terms.pop(edge))
        settle(self.tape, self.slopes, self.form)
        self.form.routes += [Route(((None, COUPLED),)) for _ in self.form.blocks[len(self.form.routes) :]]
        return self.form

    def _term(self, edge, weight) -> None:
        for block, route in (*zip(self.form.blocks, self.form.routes, strict=True), *self.outer):
            if isinstance(block, Diagonal) and block.edges == (edge,) and block.handles is None:
                self.beside.append((block, route, self._full(edge, weight), self.chains[edge]))
                return
        known = self.ways.get((edge, self.among))
        if known is not None and getattr(self, "_" + known[0])(edge, weight, known[1]):
            return
        for name in self.among:
            found = getattr(self, "_" + name)(edge, weight, None)
            if found:
                self.ways[edge, self.among] = name, found
                return
        raise UnrecognizedLoss(leads_nowhere(self.tape.name(edge[0])))

    def _walk(self, edge, weight, _):
        try:
            self.form.add(_walked(self.tape, edge, weight, self.allow_sync, self.chains[edge]))
        except UnrecognizedLoss:
            return None
        return True

    # --- a cut ----------------------------------------------------------------------------------------------------------

    def _cut(self, edge, weight, known: Cut | None):
        """Where the loss folds a quantity at 0."""
        return self._first(edge, weight, [c for c in self._cuts(edge, known) if is_centred(self.tape, c)])

    def _link(self, edge, weight, known: Cut | None):
        """Where it makes probabilities, or the like, of a model's output."""
        order = [c for c in self._cuts(edge, known) if any(self._kind(user) in LINKS for user in c.users)]
        return self._first(edge, weight, order)

    def _convex(self, edge, weight, known: Cut | None):
        return self._first(edge, weight, self._cuts(edge, known))

    def _chosen(self, edge, weight, known: Cut | None):
        """A loss with a kink, as a quantile loss by torch.where: f'/a with the mean of |a|, as sum f' a is the loss."""
        if self.value is None or self.terms:   # the only term
            return None
        for cut in self._cuts(edge, known):
            chooses = [self.tape.kind(position).startswith("Where") for position in cut.region]
            if not any(chooses) or not all(c or is_linear(self.tape, p) for c, p in zip(chooses, cut.region, strict=True)):
                continue
            g = Tail(self.tape, edge, self._full(edge, weight), cut).gradient
            total, loss = g.abs().sum(), self.value.to(g.dtype)
            if not bool((loss > 0) & (total > 0)):
                continue
            self.form.blocks.append(diagonal_block((cut.edge,), g, g.abs() * total / loss))
            self.form.routes.append(Route(((self.chains[edge], cut.region),)))
            self.form.consumed.update(cut.region)
            return cut
        return None

    def _cuts(self, edge, known: Cut | None) -> list[Cut]:
        if known is not None:
            return [known]
        if self.tape.leaf[edge[0]] >= 0:
            return []
        return [c for c in cuts(self.tape, edge)[:_DEEPEST] if self._kind(c.edge) not in REDUCTIONS]

    def _first(self, edge, weight, order: list[Cut]):
        return next((cut for cut in order if self._try(edge, weight, cut)), None)

    def _kind(self, edge: tuple) -> str:
        return self.tape.kind(edge[0])

    def _try(self, edge, weight, cut: Cut):
        quadratic = all(self._second_degree(position) for position in cut.region)
        try:
            tail = Tail(self.tape, edge, self._full(edge, weight), cut)
            block = accepted(tail, quadratic, is_centred(self.tape, cut))
        except RuntimeError as error:
            if not UNDIFFERENTIABLE.search(str(error)):
                raise
            return None
        if block is None:
            return None
        self.form.blocks.append(block)
        self.form.routes.append(Route(((self.chains[edge], cut.region),)))
        self.form.consumed.update(cut.region)
        if self.tape.leaf[cut.edge[0]] < 0:
            self.form.consumed.add(cut.edge[0])   # it may have saved its result
        return cut

    def _second_degree(self, position: int) -> bool:
        if self.tape.kind(position) == "PowBackward0":
            return self.tape.nodes[position]._saved_exponent in (1, 2)
        return is_linear(self.tape, position) or self.tape.kind(position) in _SECOND_DEGREE

    def _full(self, edge, weight) -> torch.Tensor:
        if self.tape.leaf[edge[0]] < 0:
            metadata = self.tape.nodes[edge[0]]._input_metadata[edge[1]]
            weight = torch.as_tensor(weight, dtype=metadata.dtype, device=metadata.device)
        return torch.as_tensor(weight).expand(self.tape.shape(*edge))

    # --- monotone functions -----------------------------------------------------------------------------------------------

    def _monotone(self, edge, weight, known):
        if self.tape.leaf[edge[0]] >= 0:
            return None
        for cut in [known] if known is not None else cuts(self.tape, edge)[:_DEEPEST]:
            if all(is_linear(self.tape, position) for position in cut.region):
                continue
            try:
                tail = Tail(self.tape, edge, self._full(edge, weight), cut)
            except RuntimeError as error:
                if not UNDIFFERENTIABLE.search(str(error)):
                    raise
                continue
            slope = torch.where(torch.isfinite(tail.gradient), tail.gradient, 0.0)   # a root at 0 has none
            nested = self._nested(_OF_A_SUM)
            nested.add(*cut.edge, _number(slope, self.allow_sync), (self.chains[edge], cut.region))
            nested.form.steady = False
            if self._took(nested, cut.region):
                return cut
        return None

    def _nested(self, among: tuple):
        """For terms that may turn out not to be readable."""
        nested = _Terms(self.tape, self.allow_sync, dict(self.ways), among)
        if among is self.among:
            nested.outer = [*self.outer, *zip(self.form.blocks, self.form.routes, strict=True)]
        return nested

    def _took(self, nested, positions) -> bool:
        """Take what a nested reader finds, which stands below the nodes at these positions."""
        try:
            form = nested.rest()
        except IndefiniteForm:
            raise
        except UnrecognizedLoss:
            return False
        self.ways.update(nested.ways)
        self.beside += nested.beside
        self.form.add(form)
        self.form.consumed.update(positions)
        return True

    # --- linear operations ------------------------------------------------------------------------------------------------

    def _split(self, edge, weight, _):
        position = edge[0]
        if self.tape.leaf[position] >= 0 or not is_linear(self.tape, position):
            return None
        walk = Walk(self.tape, self.allow_sync)
        node, edges = self.tape.nodes[position], self.tape.edges[position]
        try:
            following = READERS[self._kind(edge)](walk, position, node, edges, weight)
        except UnrecognizedLoss:
            return None
        chain = self.chains[edge], position
        if len(self.terms) + len(following) == 1:
            self.add(*following[0], chain)
            self.form.consumed.add(position)
            return True
        nested = self._nested(self.among)
        nested.terms, nested.slopes, nested.chains = dict(self.terms), dict(self.slopes), dict(self.chains)
        for below, output, carried in following:
            nested.add(below, output, carried, chain)
        if not self._took(nested, (position,)):
            return None
        self.terms, self.slopes = {}, {}
        return True

    # --- scales -----------------------------------------------------------------------------------------------------------

    def _scale(self, edge, weight, known):
        position = edge[0]
        if self._kind(edge) == "LogBackward0":
            if self._kind(self.tape.edges[position][0]) in REDUCTIONS or bool((self._full(edge, weight) < 0).any()):
                return None
            self._note(*logarithm(self.tape, position, self._full(edge, weight)))
            self.form.consumed.add(position)
            return True
        if self._kind(edge) not in ("MulBackward0", "DivBackward0") or not all(self.tape.edges[position]):
            return None
        pair = factors(self.tape, position, self._full(edge, weight))
        for first, two_losses in known or ((0, True), (0, False), (1, False)):
            (loss, slope), (scale, other) = pair[first], pair[1 - first]
            if not two_losses and self._kind(scale) in REDUCTIONS:
                continue
            nested = self._nested(_OF_A_SUM)
            nested.add(*loss, _number(slope.first, self.allow_sync), (self.chains[edge], COUPLED))
            if two_losses:   # each with the other for its weight
                nested.add(*scale, _number(other.first, self.allow_sync), (self.chains[edge], COUPLED))
            nested.form.steady = False
            if self._took(nested, (position,)):
                if not two_losses:
                    self._note(scale, other)
                return ((first, two_losses),)
        return None

    def _slope(self, edge, weight, _):
        """What is linear in a quantity may stand beside a scale there."""
        if self.tape.leaf[edge[0]] < 0 and (self._kind(edge) in READERS or self._kind(edge) in REDUCTIONS):
            return None
        full = self._full(edge, weight)
        self._note(edge, Slope(full, torch.zeros_like(full), False))
        return True

    def _note(self, edge, slope: Slope) -> None:
        self.slopes[edge] = slope.plus(self.slopes.get(edge))


def _number(weight: torch.Tensor, allow_sync: bool):
    return float(weight) if weight.numel() == 1 and looked_at(weight, allow_sync) else weight
