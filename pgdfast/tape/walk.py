"""From the result of a closure to its tape: nodes in forward order, with the structure they form."""

from __future__ import annotations

import re

import torch
from torch.autograd.function import BackwardCFunction

from ..kernels import native
from .rules import RULES
from .rules.functions import FUNCTION
from .rules.table import Keyed, OwnBackward

# Signs of operations that pick another kernel where nothing requires a gradient: matmul, which folds a stack of matrices into
# one or not, attention, and the modules around it with fast paths for inference. Any other operation without a rule may, too,
# but for leaves and losses.
GRAD_MODE_DEPENDENT_OPS = {
    "BmmBackward0", "BaddbmmBackward0", "UnsafeViewBackward0", "ScaledDotProductFlashAttentionForCpuBackward0",
    "LinalgEighBackward0", "LinalgSvdBackward0",
}
_PLAIN = {
    "AccumulateGrad", "MseLossBackward0", "NllLossBackward0", "NllLoss2DBackward0", "BinaryCrossEntropyWithLogitsBackward0",
    "LinalgVectorNormBackward0",
}
CHECKPOINT = "torch.utils.checkpoint.CheckpointFunctionBackward"   # whose parameters have no edges: it is active in any case
OPAQUE = "torch._functorch."   # modules of Functions that hold whole compiled graphs
_RULE_OF_TYPE: dict[type, object] = {}
_PRODUCT = re.compile("Mm|Mv|Dot|Linear|Convolution|Rnn|Attention|Trilinear")


class Fallback(Exception):
    """The tape holds an operation without a rule; carries its name."""

    def __init__(self, operation: str):
        super().__init__(operation)
        self.operation = operation


class Structure:
    """What two tapes of the same closure share. Positions number the nodes, inputs before users.

    number: identifies the structure. roots: (position, output) of each result. names: node types. kinds: the same as
    `kind_of` gives them. leaf: number of the parameter that an AccumulateGrad node belongs to, else -1. active: does a
    parameter reach the node. edges: per node, (position, output) of each input that is active, else None. shapes: per node, of
    its outputs. hooked: positions of the active nodes with hooks that may change a gradient. complex: (position, output) of
    those that are complex. foreign: does an active node run code of the user's, by a hook or as a torch.autograd.Function?
    hides: is there a checkpoint whose parameters have no edges? wanted: positions of the active nodes that are no leaves.
    tapeless: would the operations compute the same, bit for bit, without gradients? eps: rounding unit of the coarsest type
    among the active nodes' outputs.
    """

    def __init__(self, number: int, nodes: list, roots: list, parameter_number: dict[int, int], hooked: list[int]):
        self.number, self.hooked = number, hooked
        index = {node: position for position, node in enumerate(nodes)}
        self.roots = [(index[edge.node], edge.output_nr) for edge in roots]
        self.names = [name_of(node) for node in nodes]
        self.kinds = [kind_of(node) for node in nodes]
        self.shapes = [[torch.Size(m.shape) for m in node._input_metadata] for node in nodes]
        self.leaf, self.active, self.edges = [], [], []
        for node in nodes:
            variable = getattr(node, "variable", None) if not node.next_functions else None
            number = -1 if variable is None else parameter_number.get(id(variable), -1)
            edges = []
            for child, output in node.next_functions:
                position = -1 if child is None else index[child]
                edges.append((position, output) if position >= 0 and self.active[position] else None)
            self.leaf.append(number)
            self.active.append(number >= 0 or any(edges) or self.kinds[len(self.active)] == CHECKPOINT)
            self.edges.append(tuple(edges))
        self.hides = CHECKPOINT in self.kinds
        self._used: dict[int, set[int]] | None = None
        self.rules: dict = {}   # filled by Tracer: which rules apply, by the outputs that the loss names
        self.losses: dict = {}   # filled by losses: by edge, the way in which that term was read
        self.averaged: list[int] = []   # filled by Walker: positions with hooks of DistributedDataParallel
        self.matrices: dict = {}   # filled by losses: by cut, the W of r^T W r with its eigenvectors
        self.shares: dict = {}   # filled by losses: by results, their Shares, and the saved numbers that these follow from
        self.one_element: str | None = None   # filled by Tracer: is a result of one entry a loss or a residual?
        known = all(kind in RULES or kind in _PLAIN for kind in self.kinds)
        self.tapeless = known and not GRAD_MODE_DEPENDENT_OPS.intersection(self.kinds)
        self.wanted = [k for k in range(len(nodes)) if self.active[k] and self.leaf[k] < 0]
        self.foreign = bool(hooked) or any(isinstance(nodes[k], BackwardCFunction) for k in self.wanted)
        types = [{m.dtype for m in node._input_metadata} for node in nodes]
        self.complex = {
            (k, out) for k, node in enumerate(nodes) if self.active[k]
            for out, m in enumerate(node._input_metadata) if m.dtype.is_complex
        }
        rounded = {dtype for k in self.wanted for dtype in types[k] if dtype.is_floating_point or dtype.is_complex}
        self.eps = max((torch.finfo(dtype).eps for dtype in rounded), default=0.0)

    def num_outputs(self) -> int:
        """How many numbers the active nodes put out."""
        return sum(shape.numel() for k in self.wanted for shape in self.shapes[k])

    def product_flops(self) -> float:
        """About what a backward pass takes in the tape's products of matrices: two of each, of 2 m k n."""
        total = 0.0
        for k in self.wanted:
            if _PRODUCT.search(self.kinds[k]):
                out = self.shapes[k][0].numel()
                known = [self.shapes[e[0]][e[1]] for e in self.edges[k] if e is not None and self.shapes[e[0]][e[1]].numel()]
                if len(known) > 1:   # m k n from the three sizes
                    sizes = sorted((s.numel() for s in known), reverse=True)
                    total += 4 * (out * sizes[0] * sizes[1]) ** 0.5
                elif known:
                    total += 4 * out * max(known[0][-1:] or (1,))
        return total

    def suspects(self, wrong: set[int]) -> list[str]:
        """Names of the operations through which the gradients of these parameters pass, and of no others if there are such."""
        below = []
        for leaf, edges in zip(self.leaf, self.edges, strict=True):
            below.append(set().union(*(below[e[0]] for e in edges if e is not None)) if leaf < 0 else {leaf})
        passed = [k for k in self.wanted if below[k] & wrong]
        alone = [k for k in passed if below[k] <= wrong]
        return list(dict.fromkeys(self.names[k] for k in alone or passed))

    def complex_at(self, position: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which of a node's inputs, as far as they are active, and which of its outputs are complex."""
        outputs = tuple((position, out) in self.complex for out in range(len(self.shapes[position])))
        return tuple(edge in self.complex for edge in self.edges[position]), outputs

    def used(self, position: int) -> tuple[int, ...]:
        """Numbers of a node's outputs that active nodes or the closure's results read."""
        if self._used is None:
            self._used = {}
            for edges in (*(self.edges[k] for k in self.wanted), self.roots):
                for edge in edges:
                    if edge is not None:
                        self._used.setdefault(edge[0], set()).add(edge[1])
        return tuple(sorted(self._used.get(position, ())))


class Tape:
    """One tape: its structure, and the nodes at the wanted positions."""

    __slots__ = ("active", "edges", "fresh", "leaf", "names", "nodes", "shapes", "structure")

    def __init__(self, structure: Structure, nodes: dict):
        self.structure, self.nodes = structure, nodes
        self.active, self.edges, self.leaf = structure.active, structure.edges, structure.leaf
        self.names, self.shapes = structure.names, structure.shapes
        self.fresh: list | None = None   # all nodes, where the structure is met for the first time

    def shape(self, position: int, output: int = 0) -> torch.Size:
        """Shape of an output of a node."""
        return self.shapes[position][output]

    def name(self, position: int) -> str:
        """The node's type, as autograd prints it."""
        return self.names[position]

    def kind(self, position: int) -> str:
        """The node's type, as rules and loss forms are looked up by it."""
        return self.structure.kinds[position]


class Walker:
    """Walks tapes over fixed parameters and recognizes structures it has seen.

    The core compares structures in a few microseconds; without it every tape is described anew.

    in_group: are hooks where a parameter's .grad is accumulated those by which DistributedDataParallel averages it? A step in a
    process group has no need of them.
    """

    in_group = False

    def __init__(self, params: list[torch.Tensor]):
        self._number = {id(p): k for k, p in enumerate(params)}
        self._core = native.walker(params)
        self._known: dict[int, Structure] = {}
        self._generation = 0   # of the core's structures: it forgets all of them from time to time
        self.replays = self._core is not None

    def read(self, result):
        """What the core reads of a closure's result by a replay attached to its structure; None where none fits."""
        return self._core.read(result)

    def walk(self, results: list[torch.Tensor]) -> Tape:
        """The tape below some tensors that require gradients."""
        if self._core is None:   # and nothing tells of hooks
            roots = [torch.autograd.graph.get_gradient_edge(t) for t in results]
            nodes = _forward_order([edge.node for edge in roots])
            return self._tape(Structure(-1, nodes, roots, self._number, []), nodes)
        number, fresh, nodes, hooked = self._core.walk(results)
        if not fresh:
            structure = self._known[number]
            return Tape(structure, dict(zip(structure.wanted, nodes, strict=True)))
        roots = [torch.autograd.graph.get_gradient_edge(t) for t in results]
        averaged = [k for k in hooked if hasattr(nodes[k], "variable")] if self.in_group else []
        structure = Structure(number, nodes, roots, self._number, [k for k in hooked if k not in averaged])
        structure.averaged = averaged
        return self._tape(structure, nodes)

    def remember(self, structure: Structure) -> None:
        """From now on tapes of this structure are recognized."""
        if structure.number < 0:
            return
        if self._generation != self._core.generation:
            self._generation = self._core.generation
            self._known.clear()
        self._known[structure.number] = structure
        self._core.want(structure.number, structure.wanted)

    def attach(self, core, replay, places: list[int]) -> None:
        """Let `read` try the core's part of a replay; it answers with the replay and the wanted nodes at these places."""
        self._core.attach(replay.structure.number, core, replay, places)

    def detach(self, replay) -> None:
        """Take that back."""
        self._core.detach(replay.structure.number, replay)

    @staticmethod
    def _tape(structure: Structure, nodes: list) -> Tape:
        tape = Tape(structure, {k: nodes[k] for k in structure.wanted})
        tape.fresh = nodes
        return tape


def _forward_order(roots) -> list:
    """All nodes below the roots, inputs before users."""
    order, index, following = [], set(), {}
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in index:
            stack.pop()
            continue
        if node not in following:
            following[node] = node.next_functions
            pending = [child for child, _ in following[node] if child is not None and child not in index]
            if pending:
                stack.extend(pending)
                continue
        index.add(node)
        order.append(node)
        stack.pop()
    return order


def name_of(node) -> str:
    """The type of a node as autograd prints it; Functions written in C++ share one Python type, and have names of their own."""
    name = type(node).__name__
    return node.name() if name == "CppFunction" else name


def kind_of(node) -> str:
    """The type of a node: its name, behind that of its module where it is a torch.autograd.Function written in Python.

    So a user's Function is never taken for an operation of PyTorch's, or of pgdfast's, that is called the same.
    """
    kind = type(node)
    if issubclass(kind, BackwardCFunction):
        return f"{getattr(kind, '_forward_cls', kind).__module__}.{kind.__name__}"
    return kind.__name__


def rule_of(node):
    """The rule of a node.

    Raises: Fallback naming the operation when there is none.
    """
    kind = type(node)
    found = _RULE_OF_TYPE.get(kind)
    if found is None:
        name = kind_of(node)
        found = RULES.get(name.removesuffix("_copy"))   # the same operation, out of the view's storage
        if found is None and issubclass(kind, BackwardCFunction) and not name.startswith(OPAQUE):
            found = FUNCTION
        if found is None and name_of(node).endswith("::DifferentiableGraphBackward"):
            raise Fallback(
                "DifferentiableGraphBackward (torch.jit had compiled the module before LM ran it: script or trace it anew, or "
                "call the original module)"
            )
        if found is None:
            raise Fallback(name_of(node))
        _RULE_OF_TYPE[kind] = found
    return found


def describe(value):
    """A saved field's part of the structure: a tensor's layout, those of a list's tensors, anything else itself."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride()
    if type(value) in (tuple, list) and any(type(v) is not int for v in value):
        return tuple([describe(v) for v in value])
    if type(value) is Keyed:
        return value.key
    return OwnBackward if type(value) is OwnBackward else value   # nothing may hold on to a tape
