"""Reads the form of a loss off the end of its autograd tape, as rows of a least-squares problem.

The walk starts at the loss with the cotangent 1 and goes down the tape. Through a linear operation
(sum, mean, a constant weight, a reshape) the cotangent is carried by the operation's own backward.
It ends where the loss is curved, at one of

    square            L = sum G z^2              r = sqrt(2 G) z            S = diag(sqrt(2 G))
    mse_loss          the same with z = input - target
    log_softmax       L = -sum_c q_c log p_c     r = (Q p - q) / (sqrt(Q) sqrt(p)),  Q = sum_c q_c
                                                 S = sqrt(Q) (diag(sqrt(p)) - p sqrt(p)^T)
    binary cross-entropy with logits             r = L' / sqrt(h),  h = L''  S = diag(sqrt(h))

where the cotangent G (or q = -G) weights each element. Every row has S r = dL/dz, and S S^T is the
Hessian of L with respect to z, so J = S^T dz/dtheta gives J^T r = gradient, J^T J = Gauss-Newton.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

TINY = 1e-300  # probabilities and curvatures are kept at or above it: 1 / sqrt(TINY) is finite

LINEAR = frozenset(
    f"{name}Backward"
    for name in (
        *("Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Dot", "Sum", "Mean", "Trace"),
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Squeeze", "Unsqueeze"),
        *("Permute", "Transpose", "T", "Expand", "Stack", "Cat", "Select", "Slice", "Index"),
        *("IndexSelect", "Gather", "MaskedSelect", "MaskedFill", "Where"),
        *("NllLoss", "NllLoss2D"),  # linear in the log-probabilities
    )
)
PRODUCTS = ("MulBackward", "DotBackward", "DivBackward")  # linear only with one varying factor
ADVICE = (
    "return a weighted sum of squares (mse_loss, r.square().mean(), ...), cross_entropy or "
    "binary_cross_entropy_with_logits, or return the residual tensor itself"
)


@dataclass
class Block:
    """Rows that belong together: outputs z of the model, their residual r, and the factor S.

    ``edges`` are the places on the tape that make up ``z = sum sign * output``; ``residual`` has
    the shape Z of z; ``root`` maps dz/dtheta, of shape (*Z, P), to S^T dz/dtheta, the same shape.
    ``squares``: S is constant, so that J is the derivative of the residual.
    """

    edges: list[tuple[GradientEdge, float]]
    residual: Tensor
    root: Callable[[Tensor], Tensor]
    squares: bool = True


def residual_block(residual: Tensor) -> Block:
    """L = 1/2 ||r||^2 for a residual tensor of any shape: S is the identity."""
    edges = [(get_gradient_edge(residual), 1.0)] if residual.requires_grad else []
    return Block(edges, residual.detach().double(), lambda jacobian: jacobian)


def scalar_blocks(loss: Tensor, params: Sequence[Tensor]) -> list[Block]:
    """Return the blocks of a 0-dim loss, in the order in which they were written.

    Raises ValueError for a loss that is not of a known form or has a negative weight.
    """
    root = get_gradient_edge(loss).node
    order = _operations(root)
    varying = _varying(order, params)
    cotangents = {root: torch.ones_like(loss)}
    blocks = []
    for node in order:
        if node not in cotangents or node not in varying:
            continue
        cotangent = cotangents[node]
        block = _curved(node, cotangent, varying)
        if block is not None:
            blocks.append(block)
            continue
        if not _is_linear(node, varying):
            raise ValueError(_unknown(node))
        inputs = node(cotangent)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        for (below, output), carried in zip(node.next_functions, inputs, strict=False):
            if below not in varying:
                continue
            if output > 0:  # one of several results: no operation of a known form has these
                raise ValueError(_unknown(below))
            carried = carried.sum_to_size(below._input_metadata[output].shape)  # undo broadcasting, as autograd's engine does
            cotangents[below] = cotangents.get(below, 0.0) + carried
    return blocks


def depends_on(tensor: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether the tape of ``tensor`` reaches one of the parameters."""
    if not tensor.requires_grad:
        return False
    root = get_gradient_edge(tensor).node
    return root in _varying(_operations(root), params)


# --- the curved ends ------------------------------------------------------------------------------


def _curved(node: Node, cotangent: Tensor, varying: set[Node]) -> Block | None:
    """Return the block of a node at which the loss is curved; None at any other node."""
    name, edges = _kind(node), node.next_functions
    if name == "PowBackward" and node._saved_exponent == 2:
        return _square(edges[0], node._saved_self, cotangent)
    if name in ("MulBackward", "DotBackward") and len(edges) == 2 and edges[0] == edges[1]:
        return _square(edges[0], node._saved_self, cotangent)
    if name == "MseLossBackward":
        return _mean_squared_error(node, cotangent, varying)
    if name == "LogSoftmaxBackward":
        return _cross_entropy(node, cotangent)
    if name == "BinaryCrossEntropyWithLogitsBackward":
        return _binary_cross_entropy(node, cotangent, varying)
    return None


def _square(edge: tuple[Node, int], z: Tensor, weight: Tensor) -> Block:
    """Sum of weight * z^2; the square of a 2-norm is the sum of the squares below it."""
    node, _ = edge
    if _kind(node) == "LinalgVectorNormBackward" and node._saved_ord == 2:
        inner = node._saved_self
        if not node._saved_keepdim:
            dims = range(inner.dim()) if not node._saved_dim else node._saved_dim
            # The tape keeps negative dimensions as unsigned 64-bit numbers.
            for d in sorted((d - 2**64 if d >= 2**63 else d) % inner.dim() for d in dims):
                weight = weight.unsqueeze(d)
        return _weighted([(node.next_functions[0], 1.0)], inner, weight.expand_as(inner))
    return _weighted([(edge, 1.0)], z, weight.expand_as(z))


def _mean_squared_error(node: Node, cotangent: Tensor, varying: set[Node]) -> Block:
    z = node._saved_self.detach() - node._saved_target.detach()
    weight = _elementwise(node, cotangent, z)
    edges = zip(node.next_functions, (1.0, -1.0), strict=True)
    return _weighted([(e, sign) for e, sign in edges if e[0] in varying], z, weight)


def _weighted(edges: list, z: Tensor, weight: Tensor) -> Block:
    """L = sum weight * z^2, so r = sqrt(2 weight) z."""
    if z.is_complex():
        raise ValueError(
            "pgdfast.reference: one of the loss's squares is of complex numbers; write torch.view_as_real(z).square() for |z|^2"
        )
    _require_nonnegative(weight, "the square")
    factor = (2 * weight).sqrt()
    residual = torch.where(factor == 0, 0.0, factor * z.detach())  # what has no weight may be NaN
    return Block(_gradient_edges(edges), residual, lambda jac: factor[..., None] * jac)


def _cross_entropy(node: Node, cotangent: Tensor) -> Block:
    """L = -sum q log p per sample, with the classes along the saved dimension."""
    log_p, q = node._saved_result.detach(), -cotangent
    _require_nonnegative(q, "the cross-entropy")
    dim = node._saved_dim
    dim = (dim - 2**64 if dim >= 2**63 else dim) % max(log_p.dim(), 1)
    total = q.sum(dim, keepdim=True)  # Q
    p = log_p.exp().clamp(min=TINY)
    root_total, root_p = total.sqrt(), p.sqrt()
    # A sample without weight (Q = 0, an ignored label) has no residual.
    residual = torch.where(total > 0, (total * p - q) / (root_total * root_p), 0.0)

    def root(jac: Tensor) -> Tensor:
        """Apply S^T = sqrt(Q) (diag(sqrt(p)) - sqrt(p) p^T)."""
        mean = (p[..., None] * jac).sum(dim, keepdim=True)
        return (root_total * root_p)[..., None] * (jac - mean)

    return Block(_gradient_edges([(node.next_functions[0], 1.0)]), residual, root, squares=False)


def _binary_cross_entropy(node: Node, cotangent: Tensor, varying: set[Node]) -> Block:
    """L' = w ((1 + (c - 1) t) sigma(z) - c t) and L'' = w (1 + (c - 1) t) sigma(z) sigma(-z).

    Here t is the target, c the pos_weight and w the weight of the element.
    """
    if node.next_functions[1][0] in varying:
        raise ValueError(
            "pgdfast.reference: the target of binary_cross_entropy_with_logits depends on the "
            "parameters, which has no Gauss-Newton form; detach() it"
        )
    z, t = node._saved_self.detach(), node._saved_target.detach()
    w = _elementwise(node, cotangent, z)
    w = w if node._saved_weight is None else w * node._saved_weight
    c = 1.0 if node._saved_pos_weight is None else node._saved_pos_weight
    steepness = w * (1 + (c - 1) * t)
    _require_nonnegative(w, "the binary cross-entropy")
    _require_nonnegative(steepness, "the binary cross-entropy (1 + (pos_weight - 1) * target)")
    h = (steepness * z.sigmoid() * (-z).sigmoid()).clamp(min=TINY)
    # sigma(z) - t as (1 - t) sigma(z) - t sigma(-z), which loses no digits where sigma is near 1
    slope = w * ((1 - t) * z.sigmoid() - c * t * (-z).sigmoid())
    edges = _gradient_edges([(node.next_functions[0], 1.0)])
    return Block(edges, slope / h.sqrt(), lambda jac: h.sqrt()[..., None] * jac, squares=False)


# --- the tape -------------------------------------------------------------------------------------


def _operations(root: Node) -> list[Node]:
    """All nodes below ``root``, each after every node that uses it, first arguments first."""
    finished, seen, stack = [], set(), [(root, False)]
    while stack:
        node, below_done = stack.pop()
        if below_done:
            finished.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((below, False) for below, _ in node.next_functions if below is not None)
    return finished[::-1]


def _varying(order: list[Node], params: Sequence[Tensor]) -> set[Node]:
    """Return the nodes whose value changes with a parameter; all others are constants."""
    wanted, varying = {id(p) for p in params}, set()
    for node in reversed(order):
        if id(getattr(node, "variable", None)) in wanted:
            varying.add(node)
        elif any(below in varying for below, _ in node.next_functions):
            varying.add(node)
    return varying


def _is_linear(node: Node, varying: set[Node]) -> bool:
    if _kind(node) in PRODUCTS:
        factors = [below in varying for below, _ in node.next_functions]
        divides = _kind(node) == "DivBackward" and factors[1:] == [True]
        return sum(factors) == 1 and not divides
    return _kind(node) in LINEAR


def _kind(node: Node) -> str:
    """``MseLossBackward0`` -> ``MseLossBackward``: the digit only tells overloads apart."""
    return node.name().rstrip("0123456789")


def _elementwise(node: Node, cotangent: Tensor, z: Tensor) -> Tensor:
    """Return the weight of each element of z under reduction 0 (none), 1 (mean) or 2 (sum)."""
    weight = cotangent.expand_as(z)
    return weight / z.numel() if node._saved_reduction == 1 else weight


def _gradient_edges(edges: list) -> list[tuple[GradientEdge, float]]:
    return [(GradientEdge(*edge), sign) for edge, sign in edges]


def _require_nonnegative(weight: Tensor, what: str) -> None:
    if (weight < 0).any():
        raise ValueError(
            f"pgdfast.reference: {what} has a negative weight ({weight.min().item():.3g}) in the "
            f"closure's scalar, which is no least-squares problem; {ADVICE}, with weights >= 0"
        )


def _unknown(node: Node) -> str:
    name = "a bare parameter (AccumulateGrad)" if hasattr(node, "variable") else node.name()
    return (
        f"pgdfast.reference: the closure's scalar ends in {name}, which is neither a square nor a "
        f"cross-entropy; {ADVICE}"
    )
