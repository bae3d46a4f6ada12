"""Linear operations over some dimensions, as constant matrices: running sums, interpolation, sampling."""

from __future__ import annotations

import math

import torch

from ..program import UnsupportedStructure
from .local import MOST_BYTES, local
from .selection import kept
from .table import rule, signed

aten = torch.ops.aten


def along(op, i, dim: int, shape, matrix: torch.Tensor, out):
    """Out = in_i, of this shape, times a matrix (k, n) along a dimension."""
    k, n = matrix.shape
    others = [size for d, size in enumerate(shape) if d != dim]
    count = math.prod(others)
    moved, flat = f"moved {i} {out}", f"flat {i} {out}"
    op.view(i, lambda x: x.movedim(dim, -1), out=moved)
    op.reshape(moved, (count, k), out=moved)
    op.temporary(flat, (count, n))
    op.matmul(moved, right=matrix, out=flat)
    op.view(flat, lambda y: y.view(*others, n).movedim(-1, dim), out=out)


@rule("CumsumBackward0", saved="dim", shape=True)
def cumsum(op, dim, shape, device):
    if not shape:
        op.add(0)
        return
    dim = signed(dim) % len(shape)
    along(op, 0, dim, shape, kept(_upper_ones, None, shape[dim], device, ()), 0)


def _upper_ones(_, size, device, values) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.float64, device=device).triu()


# --- interpolation: a matrix per dimension ----------------------------------------------------------------------------------


def _linear1d(x, size, align, scale):
    return aten.upsample_linear1d(x, [size], align, scale)


def _in_two(operation):
    """Along the last of two dimensions, the other one having one element."""
    return lambda x, size, align, scale: operation(x[:, :, None], [1, size], align, None, scale)[:, :, 0]


def _trilinear(x, size, align, scale):
    return aten.upsample_trilinear3d(x[:, :, None, None], [1, 1, size], align, None, None, scale)[:, :, 0, 0]


def interpolates(node: str, dims: int, operation):
    """Register a node of an operation that interpolates along its last `dims` dimensions, one after the other.

    operation: x (k, 1, k), size, align_corners, scale -> (k, 1, size). The nested derivative is the transposed map.
    """
    scales = "scales" if dims == 1 else " ".join("scales_" + d for d in "dhw"[3 - dims :])

    def matrices(sizes, output, align, scale, device):
        return [
            kept(_matrix, operation, (sizes[d - dims], output[d], align, scale[d]), device, ()) for d in range(dims)
        ]

    def chain(op, i, shape, matrices):
        for d, matrix in enumerate(matrices):
            dim = len(shape) - dims + d
            out = 0 if d == dims - 1 else f"along {d}"
            along(op, i, dim, shape, matrix, out)
            shape, i = (*shape[:dim], matrix.shape[1], *shape[dim + 1 :]), out

    @rule(node + "Backward0", saved=f"align_corners output_size self_sym_sizes {scales}", shape=True)
    def forward(op, align, output, sizes, *rest):
        *scale, _, device = rest
        chain(op, 0, tuple(sizes), matrices(sizes, output, align, scale, device))

    @rule(node + "BackwardBackward0", saved=f"align_corners output_size {scales}", shape=True)
    def backward(op, align, output, *rest):
        *scale, shape, device = rest
        found = matrices(shape, output, align, scale, device)
        chain(op, 0, (*shape[:-dims], *output), [matrix.T for matrix in found])


def _matrix(operation, key, device, values) -> torch.Tensor:
    k, size, align, scale = key
    return operation(torch.eye(k, dtype=torch.float64, device=device)[:, None], size, align, scale)[:, 0]


interpolates("UpsampleLinear1D", 1, _linear1d)
interpolates("UpsampleBilinear2D", 2, _in_two(aten.upsample_bilinear2d))
interpolates("UpsampleBicubic2D", 2, _in_two(aten.upsample_bicubic2d))
interpolates("UpsampleBilinear2DAa", 2, _in_two(aten._upsample_bilinear2d_aa))
interpolates("UpsampleBicubic2DAa", 2, _in_two(aten._upsample_bicubic2d_aa))
interpolates("UpsampleTrilinear3D", 3, _trilinear)


# --- sampling at points -----------------------------------------------------------------------------------------------------


def _sampling(op, align, grid, image, interpolation, padding, backward, sample):
    if op.needs[0]:
        n, channels, size = image.shape[0], image.shape[1], math.prod(image.shape[2:])
        points = math.prod(grid.shape[1:-1])
        if n * size * points * image.element_size() > MOST_BYTES:
            raise UnsupportedStructure(f"a sampling matrix of more than {MOST_BYTES >> 20} MB")
        unit = torch.eye(size, dtype=image.dtype, device=image.device).view(1, size, *image.shape[2:])
        matrix = sample(unit.expand(n, *unit.shape[1:]), grid, interpolation, padding, align).reshape(n, size, points)
        op.reshape(0, (n, channels, size), out="pixels")
        op.temporary("sampled", (n, channels, points))
        op.matmul("pixels", right=matrix, out="sampled")
        op.reshape("sampled", (n, channels, *grid.shape[1:-1]), out="of pixels")
    if op.needs[1]:
        local(op, backward, {1: (-1,)}, 0, (1,))
        if op.needs[0]:
            op.add("of pixels")
    else:
        op.view("of pixels", lambda y: y, out=0)


@rule("GridSampler2DBackward0", saved="align_corners grid input interpolation_mode padding_mode", own=True)
def grid_sampler_2d(op, align, grid, image, interpolation, padding, backward):
    _sampling(op, align, grid, image, interpolation, padding, backward, aten.grid_sampler_2d)


@rule("GridSampler3DBackward0", saved="align_corners grid input interpolation_mode padding_mode", own=True)
def grid_sampler_3d(op, align, grid, image, interpolation, padding, backward):
    _sampling(op, align, grid, image, interpolation, padding, backward, aten.grid_sampler_3d)


@rule("AffineGridGeneratorBackward0", saved="align_corners size", shape=True)
def affine_grid(op, align, size, shape, device):
    dims = shape[-1]
    k = dims * (dims + 1)
    matrix = aten.affine_grid_generator(
        torch.eye(k, dtype=torch.float64, device=device).view(k, dims, dims + 1), [k, *size[1:]], align).reshape(k, -1)
    op.reshape(0, (shape[0], k), out="maps")
    op.temporary("grids", (shape[0], matrix.shape[1]))
    op.matmul("maps", right=matrix, out="grids")
    op.reshape("grids", shape, out=0)
