"""Cases for operations that pick elements or write them to places: functions of a (3, 4), b (3, 4), c (4,), m (4, 5)."""

import warnings

import torch
import torch.nn.functional as F
from helpers import gradient, rand

aten = torch.ops.aten
C = rand(3, 4, seed=9)   # a constant
MASK = C > 0
IDS = torch.tensor([[1, 0, 2], [2, 2, 1]])
TWICE = torch.tensor([2, 0, 2, 1])
ONCE = torch.tensor([2, 0, 1])
PLACES = rand(3, 4, seed=8).argsort(1)


def image(x):
    """(3, 4) or (4, 5) numbers as an image (1, 1, height, width)."""
    return torch.tanh(x)[None, None]


def volume(x):
    """(3, 4) numbers as a volume (1, 1, 2, 3, 4)."""
    return torch.stack([x, x * x])[None, None]


def written(write, start=lambda a: 2.0 * a):
    """A function that writes in place into a tensor computed from a."""
    def run(a, b, c, m):
        y = start(a)
        write(y, a, b, c)
        return y

    return run


def setitem(index, value, start=lambda a: 2.0 * a):
    """y[index] = value."""
    return written(lambda y, a, b, c: y.__setitem__(index, value(a, b, c)), start)


def quiet(function):
    """Of a function that PyTorch calls a prototype."""
    def run(*inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*inputs)

    return run


def zeros(a):
    """A start that no parameter reaches."""
    return torch.zeros(3, 4, dtype=torch.float64)


def several(*functions):
    """All results of several functions."""
    return lambda a, b, c, m: tuple(function(a, b, c, m) for function in functions)


def first(function):
    """The derivative of sum((function(x) - 1)^3) for an x computed from a, by nested autograd.grad."""
    def run(a, b, c, m):
        x = torch.tanh(a)
        return gradient((function(x) - 1) ** 3, x) * b

    return run


SELECTION = {
    "flip": lambda a, b, c, m: (a.flip(0), a.flip(-1), (2 * a).flip((0, 1)), c.flip(0), a.fliplr(), torch.tanh(C @ m).flip(0)),
    "roll": lambda a, b, c, m: (
        a.roll(1, 0), a.roll((1, -2), (0, 1)), a.roll(3), torch.tanh(a).roll(1, 1) - 2 * a, torch.tanh(C @ m).roll(2, -1)),
    "rot90": lambda a, b, c, m: (a.rot90(), a.rot90(2), a.rot90(-1, (1, 0)), m.rot90(3)),
    "padding": lambda a, b, c, m: (
        F.pad(a, (1, 2)), F.pad(a, (1, 0, 2, 1), value=3.0), F.pad(a, (-1, 2)), F.pad(a, (-1, -1, 1, 0)), F.pad(a, (-2, -2))),
    "padding by reflection": lambda a, b, c, m: (
        F.pad(a, (1, 2), mode="reflect"), F.pad(image(a), (1, 2, 2, 0), mode="reflect"),
        F.pad(volume(a), (1, 2, 2, 0, 1, 1), mode="reflect")),
    "padding by replication": lambda a, b, c, m: (
        F.pad(a, (1, 2), mode="replicate"), F.pad(image(a), (1, 2, 2, 0), mode="replicate"),
        F.pad(volume(a), (1, 2, 2, 0, 1, 1), mode="replicate")),
    "padding in circles": lambda a, b, c, m: (
        F.pad(a[None], (1, 2), mode="circular"), F.pad(image(a), (1, 2, 2, 0), mode="circular")),
    "unfold": lambda a, b, c, m: (a.unfold(0, 2, 1), a.unfold(-1, 3, 1), (2 * a).unfold(1, 2, 2), c.unfold(0, 2, 1)),
    "im2col": lambda a, b, c, m: (
        F.unfold(image(a), 2), F.unfold(image(m), (2, 3), padding=1, stride=2), F.unfold(image(m)[0], 2, dilation=2)),
    "col2im": lambda a, b, c, m: (
        F.fold(torch.tanh(a.T)[None], (2, 4), 2), F.fold((2 * a).T[None], (4, 2), 2),
        F.fold(m[:, :4], (3, 2), 2, padding=(0, 1), stride=(1, 2))),
    "pixels": lambda a, b, c, m: (
        F.pixel_shuffle(a.reshape(1, 4, 3, 1), 2), F.pixel_unshuffle(m[:, :4].reshape(1, 1, 4, 4), 2),
        F.channel_shuffle(a.reshape(1, 6, 2, 1), 3), F.pixel_shuffle(torch.tanh(m).reshape(4, 5, 1), 2)),
    "nearest": lambda a, b, c, m: (
        F.interpolate(a[None], scale_factor=2), F.interpolate(image(a), size=(5, 7)), F.interpolate(volume(a), scale_factor=2),
        F.interpolate(a[None], size=6, mode="nearest-exact"), F.interpolate(image(a), scale_factor=1.5, mode="nearest-exact"),
        F.interpolate(volume(a), size=(3, 4, 5), mode="nearest-exact")),
    "diagonals": lambda a, b, c, m: (
        c.diag(), c.diag(1), torch.diag_embed(a, -1), torch.diag_embed(a, 1, 0, 2), torch.trace(a @ b.T).view(1),
        m[:, :4].diag(1)),
    "strides": lambda a, b, c, m: (
        torch.as_strided(2.0 * a, (2, 3), (4, 1), 1), torch.as_strided(torch.tanh(a), (3, 3), (1, 2)),
        (2.0 * a).T.as_strided((2, 2), (1, 3), 2)),
    "medians": lambda a, b, c, m: (
        a.median(1)[0], a.nanmedian(0)[0], (2 * a).kthvalue(2, 1)[0], a.mode(1, keepdim=True)[0], c.median(0)[0].view(1)),
    "running extrema": lambda a, b, c, m: (a.cummax(1)[0], (a * b).cummin(0)[0]),
    "stable sort": lambda a, b, c, m: (torch.sort(a, stable=True, dim=1)[0], a.msort()),
    "max_pool": lambda a, b, c, m: (
        F.max_pool1d(a[None], 2), F.max_pool1d(torch.tanh(a), 3, 1, 1), F.max_pool2d(image(m), 2),
        F.max_pool2d(image(m), 3, 1, 1),
        F.max_pool3d(volume(a), 2), F.adaptive_max_pool1d(a[None], 3), F.adaptive_max_pool2d(image(m), (2, 3)),
        F.adaptive_max_pool3d(volume(a), (1, 2, 3))),
    "fractional max_pool": lambda a, b, c, m: (
        F.fractional_max_pool2d(image(m), 2, (2, 3), _random_samples=torch.full((1, 1, 2), 0.3, dtype=torch.float64)),
        F.fractional_max_pool3d(volume(a), (1, 2, 2), (1, 1, 2),
        _random_samples=torch.full((1, 1, 3), 0.3, dtype=torch.float64))),
    "max_unpool": lambda a, b, c, m: (
        F.max_unpool2d(*F.max_pool2d(image(m), 2, return_indices=True), 2, output_size=(4, 5)),
        F.max_unpool3d(*F.max_pool3d(volume(a), (1, 1, 2), return_indices=True), (1, 1, 2))),
    "repeat_interleave": lambda a, b, c, m: (
        a.repeat_interleave(2, 0), a.repeat_interleave(torch.tensor([1, 0, 2, 1]), 1),
        torch.meshgrid(c, a[0], indexing="ij")[0],
        torch.block_diag(a, b) if False else torch.movedim(a, 0, 1)),
    "unsafe splits": lambda a, b, c, m: (
        *torch.unsafe_split(a, 2, 0), *torch.unsafe_chunk(m, 2, 1), *torch.unsafe_split_with_sizes(m, (1, 3), 0)),
    "unsafe index": lambda a, b, c, m: (aten._unsafe_index(a, [IDS]), aten.narrow_copy(a, 1, 1, 2),
        aten._reshape_copy(a, (12,))),
    "lift": lambda a, b, c, m: aten.lift(2.0 * a),
    "cat of several constants": lambda a, b, c, m: (
        torch.cat([C, a, C]), torch.cat([C[:, :1], a, C[:, :2], b, C], 1), torch.hstack([C[0], c, C[0, :1]])),
}
WRITES = {
    "scatter": lambda a, b, c, m: (
        a.scatter(1, PLACES, b), a.scatter(0, IDS[:, [0, 1, 2, 0]], b[:2]), a.scatter(1, PLACES[:, :2], 1.5),
        C.scatter(1, PLACES, b), a.scatter(1, PLACES, C), torch.zeros_like(C).scatter(0, PLACES[:1] % 3, b[:1])),
    "scatter_add": lambda a, b, c, m: (
        a.scatter_add(0, IDS[:, [0, 1, 2, 0]], b[:2]), C.scatter_add(1, PLACES // 2, torch.tanh(b)),
        a.scatter_add(1, PLACES, C)),
    "scatter_reduce": lambda a, b, c, m: tuple(
        a.scatter_reduce(1, PLACES // 2, b, kind, include_self=own) for kind in ("sum", "prod", "mean", "amax", "amin")
        for own in (True, False)) + (C.scatter_reduce(0, PLACES % 3, torch.tanh(b), "sum"),),
    "index_add": lambda a, b, c, m: (
        m.index_add(0, IDS[0], a[:, :1] * C[0, 0] + torch.zeros(3, 5, dtype=torch.float64)),
        a.index_add(0, TWICE, m[:, :4], alpha=0.3), a.index_add(1, ONCE, (a @ m)[:, :3]), C.index_add(0, ONCE, b),
        c.index_add(0, ONCE, C[0, :3])),
    "index_copy": lambda a, b, c, m: (a.index_copy(0, ONCE[:2], b[:2]), C.index_copy(1, ONCE, (a @ m)[:, :3])),
    "index_reduce": quiet(lambda a, b, c, m: (
        a.index_reduce(0, TWICE, m[:, :4], "prod"), a.index_reduce(1, ONCE, b[:, :3], "mean"),
        C.index_reduce(1, ONCE, b[:, :3], "amax"))),
    "index_fill": lambda a, b, c, m: (a.index_fill(0, ONCE[:1], 1.5), a.index_fill(1, ONCE[:2], b[0, 0]),
        C.index_fill(1, ONCE[:2], c[0])),
    "index_put": lambda a, b, c, m: (
        a.index_put((ONCE[:2],), b[:2]), a.index_put((ONCE[:2],), c), a.index_put((MASK,), b[0, 0]),
        a.index_put((IDS, IDS + 1), b[:2, :3]),
        a.index_put((ONCE[:2], ONCE[:2]), torch.tensor(0.0, dtype=torch.float64)), C.index_put((MASK,), b[MASK]),
        aten._unsafe_index_put(a, [ONCE[:2]], b[:2])),
    "index_put with sums": lambda a, b, c, m: (
        a.index_put((TWICE,), m[:, :4], accumulate=True), a.index_put((TWICE,), c, accumulate=True),
        C.index_put((IDS, IDS), b[:2, :3], accumulate=True), aten.index_put(a, [None, TWICE], b, True)),
    "put": lambda a, b, c, m: (a.put(IDS, b[:2, :3]), a.put(-IDS - 1, b[:2, :3], accumulate=True), C.put(ONCE, c[:3])),
    "masked_scatter": lambda a, b, c, m: (a.masked_scatter(MASK, m), C.masked_scatter(MASK[0], b), a.masked_scatter(MASK, C)),
    "masked_fill by a tensor": lambda a, b, c, m: (a.masked_fill(MASK, b[0, 0]), C.masked_fill(MASK[0], c[1]),
        a.masked_fill(MASK, C[0, 0])),
    "windows": lambda a, b, c, m: (
        torch.slice_scatter(a, b[:2], 0, 1), torch.slice_scatter(a, C[:, :2], 1, 0, 4, 2), torch.select_scatter(a, c, 0, -1),
        torch.select_scatter(C, b[:, 0], 1, 2), torch.diagonal_scatter(a, c[:3]), torch.diagonal_scatter(a, b[:2, 0], -1),
        torch.slice_scatter(C, b, 0)),
    "fill": lambda a, b, c, m: ((2.0 * a).fill_(1.5) + b, (2.0 * a).fill_(b[0, 0]), torch.fill(a, c[0]),
        torch.fill(a, 2.0) * b, torch.fill(C, c[1]),
        C.clone().fill_(c[1])),
    "setitem": several(
        setitem((slice(None), 0), lambda a, b, c: b[:, 1]), setitem(1, lambda a, b, c: c),
        setitem((slice(None), -1), lambda a, b, c: 1.5),
        setitem((slice(1, None), slice(None, None, 2)), lambda a, b, c: torch.tanh(b[:2, :2])),
        setitem(0, lambda a, b, c: b[0, 0]),
        setitem((slice(None), 0), lambda a, b, c: C[:, 0]), setitem((0, 1), lambda a, b, c: c[2]),
        setitem((slice(None), 0), lambda a, b, c: b[:, 1], zeros), setitem(slice(1, 3), lambda a, b, c: c[:1], zeros),
        setitem(slice(None), lambda a, b, c: b), setitem(IDS, lambda a, b, c: c), setitem(MASK, lambda a, b, c: 0.0),
        setitem((slice(None), slice(2)), lambda a, b, c: c[:2], lambda a: (2.0 * a).T.contiguous().T)),
    "views in place": several(
        written(lambda y, a, b, c: y[:, 1].mul_(b[:, 0])), written(lambda y, a, b, c: y[1:].add_(b[:2], alpha=0.3)),
        written(lambda y, a, b, c: y[0].exp_()), written(lambda y, a, b, c: y[:, ::2].addcmul_(b[:, :2], c[:2])),
        written(lambda y, a, b, c: y.T[1].zero_()), written(lambda y, a, b, c: y[:2].copy_(b[1:])),
        written(lambda y, a, b, c: (y[:, 0].mul_(2), y[0].add_(y[1]), y[1].tanh_())),
        written(lambda y, a, b, c: y.diagonal().add_(c[:3])), written(lambda y, a, b, c: y.view(-1)[::5].mul_(3.0)),
        written(lambda y, a, b, c: (y[0], y.sin_())[0].mul_(c))),
    "columns one by one": written(lambda y, a, b, c: [y.__setitem__((slice(None), k),
        torch.tanh(a[:, k] * b[:, k - 1])) for k in range(4)], zeros),
    "derivatives of picks": several(
        first(lambda x: x[:, [0, 0, 2]]), first(lambda x: x.gather(1, PLACES // 2)), first(lambda x: F.embedding(IDS, x)),
        first(lambda x: x.index_select(1, TWICE)), first(lambda x: x.take(IDS)), first(lambda x: x[MASK]),
        first(lambda x: x.sort(1)[0]),
        first(lambda x: x.flip(0)), first(lambda x: x.unfold(1, 2, 1)), first(lambda x: F.pad(x, (1, 1)) * 2),
        first(lambda x: x.diagonal()), first(lambda x: x.max(1)[0])),
    "derivatives of pads": several(
        first(lambda x: F.pad(x, (1, 2), mode="reflect")), first(lambda x: F.pad(x[None, None], (1, 2, 1, 1), mode="reflect")),
        first(lambda x: F.pad(x.view(1, 1, 2, 2, 3), (1, 1, 1, 1, 1, 1), mode="reflect")),
        first(lambda x: F.pad(x, (1, 2), mode="replicate")), first(lambda x: F.pad(x[None, None], (1, 2, 1, 1),
        mode="replicate")),
        first(lambda x: F.pad(x.view(1, 1, 2, 2, 3), (1, 1, 1, 1, 1, 1), mode="replicate"))),
    "derivatives of pools": several(
        first(lambda x: F.max_pool2d(x[None], 2)), first(lambda x: F.adaptive_max_pool2d(x[None], (3, 2))),
        first(lambda x: F.max_pool3d(x.view(1, 2, 2, 3), 2)), first(lambda x: F.adaptive_max_pool3d(x.view(1, 2, 2, 3), 2))),
    "derivatives of random pools": several(
        first(lambda x: F.fractional_max_pool2d(
            x[None], 2, (2, 3), _random_samples=torch.full((1, 1, 2), 0.3, dtype=torch.float64))),
        first(lambda x: F.fractional_max_pool3d(
            torch.stack([x, x * x])[None, None], (1, 2, 2), (1, 1, 2),
            _random_samples=torch.full((1, 1, 3), 0.3, dtype=torch.float64))),
        lambda a, b, c, m: aten.native_dropout_backward(a, MASK, 2.0), first(lambda x: x.masked_select(MASK)),
        first(lambda x: aten.masked_scatter(x, MASK, x * x))),
    "in place": lambda a, b, c, m: (
        (2.0 * a).unsqueeze_(0), (2.0 * a).transpose_(0, 1), (2.0 * a).t_(), torch.quantile(a, 0.3, dim=1),
        torch.frexp(a)[0] + b, torch.angle(a) * b, torch.block_diag(a, c, b[:2, :2]), torch.block_diag(C, a)),
    "derivatives of windows": several(
        first(lambda x: F.unfold(x[None, None], 2)), first(lambda x: F.interpolate(x[None], scale_factor=2)),
        first(lambda x: F.interpolate(x[None, None], size=(4, 5))),
        first(lambda x: F.interpolate(x.view(1, 1, 2, 2, 3), scale_factor=2)),
        first(lambda x: F.interpolate(x[None], size=6, mode="nearest-exact")),
        first(lambda x: F.fold(x.T[None], (2, 4), (2, 2))),
        first(lambda x: F.interpolate(x[None, None], size=(4, 5), mode="nearest-exact")),
        first(lambda x: F.interpolate(x.view(1, 1, 2, 2, 3), size=(3, 3, 4), mode="nearest-exact"))),
}
