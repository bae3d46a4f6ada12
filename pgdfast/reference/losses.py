"""Reads the form of a loss off the end of its autograd tape, as rows of a least-squares problem.

The walk starts at the loss with the cotangent 1 and goes down the tape. Through a linear operation
(sum, mean, a constant weight, a reshape) the cotangent is carried by the operation's own backward.
It ends where the loss is curved, at one of

    square            L = sum G z^2              r = sqrt(2 G) z            S = diag(sqrt(2 G))
    mse_loss          the same with z = input - target
    norm, dist, std   the same with G = weight / (2 norm), as is |z| of complex numbers
    huber, smooth_l1  L' and h = L' / z of z = input - target      r = L' / sqrt(h)    S = diag(sqrt(h))
    log_softmax       L = -sum_c q_c log p_c     r = (Q p - q) / (sqrt(Q) sqrt(p)),  Q = sum_c q_c
                                                 S = sqrt(Q) (diag(sqrt(p)) - p sqrt(p)^T)
    binary cross-entropy with logits             r = L' / sqrt(h),  h = L''  S = diag(sqrt(h))

where the cotangent G (or q = -G) weights each element. Every row has S r = dL/dz, and S S^T is the
Hessian of L with respect to z, so J = S^T dz/dtheta gives J^T r = gradient, J^T J = Gauss-Newton.
"""

import math
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
        *("IndexSelect", "ViewAsReal", "Real", "Gather", "MaskedSelect", "MaskedFill", "Where", "Nansum", "IndexPut", "Flip"),
        *("SliceScatter", "SelectScatter", "IndexCopy", "Scatter", "Repeat"),
        *("NllLoss", "NllLoss2D"),  # linear in the log-probabilities
    )
)
STEEP = frozenset(  # losses whose rows have weights that change with the parameters
    f"{name}Backward" for name in ("LinalgVectorNorm", "Dist", "Std", "HuberLoss", "SmoothL1Loss", "Softmax", "Abs")
)
PRODUCTS = ("MulBackward", "DotBackward", "VdotBackward", "DivBackward")  # linear only with one varying factor
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
    parts: tuple[Tensor, Tensor] | None = None  # of a diagonal S S^T, the derivative and it


def residual_block(residual: Tensor) -> Block:
    """L = 1/2 ||r||^2 for a residual tensor of any shape: S is the identity."""
    edges = [(get_gradient_edge(residual), 1.0)] if residual.requires_grad else []
    return Block(edges, residual.detach().double(), lambda jacobian: jacobian)


def walked(root: Node, cotangent: Tensor, order: Sequence[Node], varying: set[Node]) -> tuple[list[Block], bool]:
    """Return the blocks below a node, in the order in which they were written, and whether their weights are constant.

    order: of all operations, each after every one that uses it. varying: those that depend on the parameters.
    Raises ValueError for a node that is not of a known form or has a negative weight.
    """
    cotangents, blocks, constant = {root: cotangent}, [], True
    for node in order:
        if node not in cotangents or node not in varying:
            continue
        cotangent = cotangents[node]
        block = _curved(node, cotangent, varying)
        if block is not None:
            blocks.append(block)
            constant &= kind_of(node) not in STEEP
            continue
        if not is_linear(node, varying):
            raise ValueError(_unknown(node))
        for below, carried in pulled(node, cotangent, varying):
            cotangents[below] = cotangents.get(below, 0.0) + carried
    return blocks, constant


def pulled(node: Node, cotangent: Tensor, varying: set[Node]) -> list[tuple[Node, Tensor]]:
    """Return the inputs of a linear operation that depend on the parameters, with their cotangents."""
    inputs = node(cotangent)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    found = []
    for (below, output), carried in zip(node.next_functions, inputs, strict=False):
        if below not in varying:
            continue
        if output > 0:  # one of several results: no operation of a known form has these
            raise ValueError(_unknown(below))
        # Undo broadcasting, as autograd's engine does.
        found.append((below, carried.sum_to_size(below._input_metadata[output].shape)))
    return found


def depends_on(tensor: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether the tape of ``tensor`` reaches one of the parameters."""
    if not tensor.requires_grad:
        return False
    root = get_gradient_edge(tensor).node
    return root in varying_nodes(operations(root), params)


# --- the curved ends ------------------------------------------------------------------------------


def _curved(node: Node, cotangent: Tensor, varying: set[Node]) -> Block | None:
    """Return the block of a node at which the loss is curved; None at any other node."""
    name, edges = kind_of(node), node.next_functions
    if name == "PowBackward" and node._saved_exponent == 2:
        return _square(edges[0], node._saved_self, cotangent)
    if name in ("MulBackward", "DotBackward", "VdotBackward") and sum(below in varying for below, _ in edges) == 2:
        if cotangent.is_complex() and (name == "VdotBackward" or edges[0] != edges[1]):
            return _modulus(node, cotangent)
        if edges[0] == edges[1]:
            return _square(edges[0], node._saved_self, cotangent)
    if name == "MulBackward" and sum(below in varying for below, _ in edges) == 2 and _same(node, varying):
        return _square(edges[0], node._saved_self, cotangent)
    if name == "LinalgVectorNormBackward":
        return _norm(node, cotangent)
    if name == "DistBackward" and node._saved_p == 2:
        return _distance(node, cotangent, varying)
    if name in ("VarBackward", "StdBackward"):
        return _variance(node, cotangent)
    if name in ("HuberLossBackward", "SmoothL1LossBackward"):
        return _robust(node, cotangent, varying)
    if name == "AbsBackward" and node._saved_self.is_complex():
        z, size = node._saved_self, node._saved_self.detach().abs()
        return _weighted([(edges[0], 1.0)], z, torch.where(size > 0, cotangent / (2 * size), 0.0))
    if name == "SoftmaxBackward":
        return _probability(node, cotangent)
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
    if kind_of(node) == "LinalgVectorNormBackward" and node._saved_ord == 2:
        return _weighted([(node.next_functions[0], 1.0)], node._saved_self, _repeated(node, weight))
    if kind_of(node) == "AbsBackward" and node._saved_self.is_complex():
        return _weighted([(node.next_functions[0], 1.0)], node._saved_self, weight.expand(z.shape))
    if z.is_complex():
        raise ValueError(
            "pgdfast.reference: one of the loss's squares is of complex numbers; write torch.view_as_real(z).square() for |z|^2"
        )
    return _weighted([(edge, 1.0)], z, weight.expand_as(z))


def _modulus(product: Node, cotangent: Tensor) -> Block | None:
    """|z|^2 written as z conj(z), or as the inner product of z with itself."""
    (a, _), (b, _) = product.next_functions
    z = product._saved_self
    if kind_of(product) == "MulBackward":
        if kind_of(a).startswith("Conj"):
            a, b, z = b, a, product._saved_other
        if not kind_of(b).startswith("Conj") or b.next_functions[0][0] is not a:
            return None
    elif a is not b:
        return None
    return _weighted([((a, 0), 1.0)], z, cotangent.real.expand(z.shape))


def _same(product: Node, varying: set[Node]) -> bool:
    """Whether two factors are the same quantity, written twice: of equal value and, along random cotangents, derivative."""
    a, b = product._saved_self, product._saved_other
    if not torch.equal(a, b):
        return False
    leaves = [GradientEdge(node, 0) for node in varying if hasattr(node, "variable")]
    cotangent = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    slopes = [
        torch.autograd.grad([GradientEdge(*edge)], leaves, [cotangent], retain_graph=True, allow_unused=True)
        for edge in product.next_functions
    ]
    zero = torch.zeros((), dtype=a.dtype)
    return all(
        (x if x is not None else zero).sub(y if y is not None else zero).norm() <= 1e-12 * (x if x is not None else zero).norm()
        for x, y in zip(*slopes, strict=True)
    )


def _repeated(node: Node, weight: Tensor) -> Tensor:
    """The weight of a reduction, for each of the numbers that it reduces."""
    inner = node._saved_self
    if not node._saved_keepdim:
        for d in _dimensions(node):
            weight = weight.unsqueeze(d)
    return weight.expand_as(inner)


def _dimensions(node: Node) -> list[int]:
    """Which dimensions a reduction goes over; the tape keeps negative ones as unsigned 64-bit numbers."""
    inner = node._saved_self
    dims = range(inner.dim()) if not node._saved_dim else node._saved_dim
    return sorted((d - 2**64 if d >= 2**63 else d) % max(inner.dim(), 1) for d in dims)


def _norm(node: Node, weight: Tensor) -> Block:
    """Weight * ||z||: the sum of squares S below has the weight of d sqrt(S) / dS = 1 / (2 sqrt(S)); none where S = 0."""
    if node._saved_ord == 2:
        norm = node._saved_result.detach()
        weight = _repeated(node, torch.where(norm > 0, weight / (2 * norm), 0.0))
        block = _weighted([(node.next_functions[0], 1.0)], node._saved_self, weight)
        block.squares = False
        return block
    if node._saved_ord != 1:
        raise ValueError(_unknown(node))
    z, weight = node._saved_self.detach(), _repeated(node, weight)
    _require_nonnegative(weight, "the norm")
    slope = weight * z.sign()
    return diagonal([(node.next_functions[0], 1.0)], slope, reweighted(slope, z))


def _distance(node: Node, weight: Tensor, varying: set[Node]) -> Block:
    z, norm = node._saved_self.detach() - node._saved_other.detach(), node._saved_result.detach()
    edges = zip(node.next_functions, (1.0, -1.0), strict=True)
    weight = torch.where(norm > 0, weight / (2 * norm), 0.0).expand_as(z)
    block = _weighted([(e, sign) for e, sign in edges if e[0] in varying], z, weight)
    block.squares = False
    return block


def _variance(node: Node, weight: Tensor) -> Block:
    """Weight * ||z - mean z||^2 / (n - correction), or weight * its root."""
    z, dims = node._saved_self.detach(), _dimensions(node)
    count = math.prod(z.shape[d] for d in dims)
    if kind_of(node) == "StdBackward":
        deviation = node._saved_result.detach()
        weight = torch.where(deviation > 0, weight / (2 * deviation), 0.0)
    correction = 1.0 if node._saved_correction is None else node._saved_correction
    weight = _repeated(node, weight / (count - correction))
    _require_nonnegative(weight, "the variance")
    factor = (2 * weight).sqrt()

    def root(jac: Tensor) -> Tensor:
        return factor[..., None] * (jac - jac.mean(dims, keepdim=True))

    residual = factor * (z - z.mean(dims, keepdim=True))
    return Block(_gradient_edges([(node.next_functions[0], 1.0)]), residual, root, kind_of(node) == "VarBackward")


def _robust(node: Node, cotangent: Tensor, varying: set[Node]) -> Block:
    """Huber and smooth_l1 of d = input - target: h = L' / d, which is L'' inside."""
    d = node._saved_self.detach() - node._saved_target.detach()
    weight = _elementwise(node, cotangent, d)
    _require_nonnegative(weight, "the huber or smooth_l1 loss")
    if kind_of(node) == "HuberLossBackward":
        slope, h = d.clamp(-node._saved_delta, node._saved_delta), (node._saved_delta / d.abs()).clamp(max=1.0)
    elif node._saved_beta == 0:
        slope = d.sign()
        h = reweighted(slope, d)
    else:
        beta = node._saved_beta
        slope, h = (d / beta).clamp(-1.0, 1.0), (1 / d.abs()).clamp(max=1 / beta)
    edges = [(e, sign) for e, sign in zip(node.next_functions, (1.0, -1.0), strict=True) if e[0] in varying]
    return diagonal(edges, weight * slope, weight * h)


def _probability(node: Node, cotangent: Tensor) -> Block:
    """What falls with probabilities p, as sum -q log p with the slope that it has here."""
    p = node._saved_result.detach()
    return _entropy(node, p, -cotangent * p)


def diagonal(edges: list, slope: Tensor, h: Tensor) -> Block:
    """A function with derivative ``slope`` of each element and second derivative h, which are rows where h > 0."""
    h = torch.where((h <= 0) & (slope == 0), 0.0, h.clamp(min=TINY))
    root = h.sqrt()
    residual = torch.where(h > 0, slope / root, 0.0)
    return Block(_gradient_edges(edges), residual, lambda jac: root[..., None] * jac, False, (slope, h))


def reweighted(slope: Tensor, a: Tensor) -> Tensor:
    """Slope / a, with |a| at least a thousandth of its mean."""
    floor = 1e-3 * a.abs().mean()
    size = torch.maximum(a.abs(), floor)
    ratio = torch.where(a == 0, slope.abs() / floor, slope / torch.where(a < 0, -size, size))
    return torch.where(slope == 0, 0.0, ratio)


def _mean_squared_error(node: Node, cotangent: Tensor, varying: set[Node]) -> Block:
    z = node._saved_self.detach() - node._saved_target.detach()
    weight = _elementwise(node, cotangent, z)
    edges = zip(node.next_functions, (1.0, -1.0), strict=True)
    return _weighted([(e, sign) for e, sign in edges if e[0] in varying], z, weight)


def _weighted(edges: list, z: Tensor, weight: Tensor) -> Block:
    """L = sum weight * z^2, so r = sqrt(2 weight) z."""
    if z.is_complex():  # of |z|^2: the real and the imaginary part
        with torch.enable_grad():
            z = torch.view_as_real(z.resolve_conj())
        edges, weight = [(get_gradient_edge(z), 1.0)], weight[..., None].expand(z.shape)
    _require_nonnegative(weight, "the square")
    factor = (2 * weight).sqrt()
    residual = torch.where(factor == 0, 0.0, factor * z.detach())  # what has no weight may be NaN
    parts = 2 * weight * z.detach(), 2 * weight
    return Block(_gradient_edges(edges), residual, lambda jac: factor[..., None] * jac, parts=parts)


def _cross_entropy(node: Node, cotangent: Tensor) -> Block:
    """L = -sum q log p per sample, with the classes along the saved dimension."""
    return _entropy(node, node._saved_result.detach().exp(), -cotangent)


def _entropy(node: Node, p: Tensor, q: Tensor) -> Block:
    _require_nonnegative(q, "the cross-entropy")
    dim = node._saved_dim
    dim = (dim - 2**64 if dim >= 2**63 else dim) % max(p.dim(), 1)
    total = q.sum(dim, keepdim=True)  # Q
    p = p.clamp(min=TINY)
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
    return Block(edges, slope / h.sqrt(), lambda jac: h.sqrt()[..., None] * jac, False, (slope, h))


# --- the tape -------------------------------------------------------------------------------------


def operations(root: Node) -> list[Node]:
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


def varying_nodes(order: list[Node], params: Sequence[Tensor]) -> set[Node]:
    """Return the nodes whose value changes with a parameter; all others are constants."""
    wanted, varying = {id(p) for p in params}, set()
    for node in reversed(order):
        if id(getattr(node, "variable", None)) in wanted:
            varying.add(node)
        elif any(below in varying for below, _ in node.next_functions):
            varying.add(node)
    return varying


def is_linear(node: Node, varying: set[Node]) -> bool:
    """Whether an operation is linear in its varying inputs together."""
    if kind_of(node) in PRODUCTS:
        factors = [below in varying for below, _ in node.next_functions]
        divides = kind_of(node) == "DivBackward" and factors[1:] == [True]
        return sum(factors) == 1 and not divides
    return kind_of(node) in LINEAR or kind_of(node).endswith(("CopySlices", "CopyBackwards"))


def kind_of(node: Node) -> str:
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
