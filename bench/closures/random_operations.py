"""Operations that random closures are made of.

An operation is a function of (draw, shape) that returns what to apply to a tensor of that shape, an `Applied`, or None where
it does not fit. What it applies is fixed then: dims, constants and other operands are drawn once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

GAP = 1e-4   # how far values keep from kinks and from each other where an operation asks for that


@dataclass(frozen=True)
class Applied:
    """fn: (tensor, *others) -> tensor. others: references to further operands. guard: may it be applied to these?"""

    fn: Callable
    others: tuple = ()
    guard: Callable | None = None


OPERATIONS: dict[str, Callable] = {}


def away(*points):
    """A guard: no element near one of these."""
    return lambda x, *others: all(float((x - p).abs().min()) > GAP for p in points)


def distinct(x, *others):
    """A guard: no two elements are nearly equal."""
    values = x.detach().reshape(-1).sort().values
    return len(values) < 2 or float(values.diff().min()) > GAP


DOMAINS = {
    "any": lambda x: x,
    "small": torch.sin,
    "unit": lambda x: 0.9 * torch.sin(x),
    "positive": lambda x: x * x + 0.3,
    "above one": lambda x: x * x + 1.3,
}


def elementwise(domain, kinks=(), **functions):
    transform = DOMAINS[domain]
    for name, f in functions.items():
        guard = away(*kinks) if kinks else None
        OPERATIONS[name] = lambda draw, shape, f=f, guard=guard: Applied(lambda x: f(transform(x)), guard=guard)


elementwise(
    "any", tanh=torch.tanh, sigmoid=torch.sigmoid, sin=torch.sin, cos=torch.cos, silu=F.silu, gelu=F.gelu,
    gelu_tanh=lambda x: F.gelu(x, approximate="tanh"), mish=F.mish, softplus=F.softplus, logsigmoid=F.logsigmoid, erf=torch.erf,
    erfc=torch.erfc, atan=torch.atan, asinh=torch.asinh, square=torch.square, negative=torch.neg, sinc=torch.sinc,
    tanhshrink=F.tanhshrink, add_number=lambda x: x + 0.7, multiply_number=lambda x: -1.3 * x, divide_number=lambda x: x / 1.7,
    subtract_from=lambda x: 0.4 - x, rsub=lambda x: torch.rsub(x, 0.3, alpha=2), pow_3=lambda x: 0.2 * x**3,
    round=lambda x: x + x.round(),
    detached_factor=lambda x: x * x.detach().cos(), nan_to_num=torch.nan_to_num, positive=torch.positive, clone=torch.clone,
    deg2rad=lambda x: 30 * torch.deg2rad(x), ndtr=torch.special.ndtr, log_ndtr=torch.special.log_ndtr,
    contiguous=torch.Tensor.contiguous,
    tanh_in_place=lambda x: (1.1 * x).tanh_(), add_in_place=lambda x: x.sin().add_(0.2),
    sinusoid_in_place=lambda x: (x + 1).sin_(),
    multiply_in_place=lambda x: x.clone().mul_(0.7), exp_minus_square=lambda x: torch.exp(-x * x), double=lambda x: x.double(),
    bessel_j0=torch.special.bessel_j0, i0e=torch.special.i0e)
elementwise("any", (0.0,), relu=F.relu, abs=torch.abs, elu=lambda x: F.elu(x, 0.7), selu=F.selu, celu=lambda x: F.celu(x, 0.6),
            leaky_relu=lambda x: F.leaky_relu(x, 0.1), softsign=F.softsign, sign_factor=lambda x: x * torch.sign(x),
            relu_in_place=lambda x: F.relu(1.0 * x, inplace=True), rrelu_eval=F.rrelu, heaviside_factor=lambda x: x * (x > 0))
elementwise("any", (-1.0, 1.0), hardtanh=F.hardtanh)
elementwise("any", (-0.5, 0.5), softshrink=F.softshrink, hardshrink=F.hardshrink)
elementwise("any", (-3.0, 3.0), hardswish=F.hardswish, hardsigmoid=F.hardsigmoid)
elementwise("any", (0.0, 6.0), relu6=F.relu6)
elementwise("any", (-0.6, 0.8), clamp=lambda x: x.clamp(-0.6, 0.8))
elementwise("any", (0.2,), threshold=lambda x: F.threshold(x, 0.2, -0.1), clamp_min=lambda x: x.clamp_min(0.2))
elementwise("small", (), exp=torch.exp, expm1=torch.expm1, sinh=torch.sinh, cosh=torch.cosh, exp2=torch.exp2, tan=torch.tan,
       i0=torch.i0)
elementwise("unit", (), asin=torch.asin, acos=torch.acos, atanh=torch.atanh, erfinv=torch.erfinv)
elementwise("positive", (), log=torch.log, log1p=torch.log1p, log2=torch.log2, log10=torch.log10, sqrt=torch.sqrt,
       rsqrt=torch.rsqrt,
            reciprocal=torch.reciprocal, lgamma=torch.lgamma, digamma=torch.digamma, pow_fraction=lambda x: x**0.7,
            float_power=lambda x: torch.float_power(x, 1.4), xlogx=lambda x: torch.xlogy(x, x), entr=torch.special.entr)
elementwise("above one", (), acosh=torch.acosh)


def operation(name):
    def register(make):
        OPERATIONS[name] = make
        return make

    return register


# Two operands, with broadcasting.

def binary(**functions):
    for name, f in functions.items():
        OPERATIONS[name] = lambda draw, shape, f=f: Applied(f, (draw.partner(shape),))


def guarded(guard, **functions):
    for name, f in functions.items():
        OPERATIONS[name] = lambda draw, shape, f=f: Applied(f, (draw.partner(shape),), guard)


binary(
    add=torch.add, subtract=torch.sub, multiply=torch.mul, add_alpha=lambda a, b: torch.add(a, b, alpha=0.3),
    divide=lambda a, b: a / (b * b + 0.7), hypot=lambda a, b: torch.hypot(a, b + 3),
    atan2=lambda a, b: torch.atan2(a, 3 + b.sin()),
    logaddexp=torch.logaddexp, logaddexp2=torch.logaddexp2, power=lambda a, b: (a * a + 0.3) ** torch.sin(b),
    xlogy=lambda a, b: torch.xlogy(a, b * b + 0.4),
    lerp=lambda a, b: torch.lerp(a, b, 0.3), lerp_tensor=lambda a, b: torch.lerp(a, b.cos(), torch.sigmoid(b)),
    addcmul=lambda a, b: torch.addcmul(a, b, a.cos(), value=0.4),
    addcdiv=lambda a, b: torch.addcdiv(a, b, 1 + a * a, value=0.4),
    where_data=lambda a, b: torch.where(b.detach() > 0.1, a, b), reversed_divide=lambda a, b: b / (1 + a * a),
    in_place_add=lambda a, b: (1.0 * a).add_(b.expand(a.shape) if b.dim() <= a.dim() and _fits(b, a) else 0.3),
    stacked_sum=lambda a, b: torch.stack(torch.broadcast_tensors(a, b)).sum(0), square_of_difference=lambda a, b: (a - b) ** 2)
guarded(lambda a, b: float((a - b).abs().min()) > GAP, maximum=torch.maximum, minimum=torch.minimum, fmax=torch.fmax,
        clamp_tensor=lambda a, b: torch.clamp(a, max=b), where_compared=lambda a, b: torch.where(a > b, a * b, a + b))
guarded(lambda a, b: _off_multiples(a, b * b + 1), remainder=lambda a, b: torch.remainder(a, b * b + 1),
        fmod=lambda a, b: torch.fmod(a, b * b + 1))


def _fits(b, a):
    return torch.broadcast_shapes(a.shape, b.shape) == a.shape


def _off_multiples(a, b):
    q = a / b
    return float((q - q.round()).abs().min()) > GAP


# Reductions and what runs along a dim.

def along(guard=None, least=1, keep=True, **functions):
    """f(x, dim) or, with `keep`, f(x, dim, keepdim)."""
    for name, f in functions.items():
        def make(draw, shape, f=f):
            if not shape:
                return None
            dim, keepdim = draw.dim(shape), draw.coin()
            if shape[dim] < least:
                return None
            dim = dim - len(shape) if draw.coin() else dim
            return Applied((lambda x: f(x, dim, keepdim)) if keep else (lambda x: f(x, dim)), guard=guard)

        OPERATIONS[name] = make


along(sum=torch.sum, mean=torch.mean, logsumexp=torch.logsumexp, nansum=torch.nansum, nanmean=torch.nanmean,
      product=lambda x, d, k: torch.prod(1 + 0.3 * x.sin(), d, k),
      count_scaled=lambda x, d, k: x.sum(d, keepdim=k) / x.shape[d])
along(least=2, variance=lambda x, d, k: x.var(d, keepdim=k), deviation=lambda x, d, k: (x + torch.arange(x.shape[d]).view(
    [-1 if i == d % x.dim() else 1 for i in range(x.dim())])).std(d, keepdim=k),
      variance_biased=lambda x, d, k: torch.var(x, d, correction=0, keepdim=k))
along(away(0.0), norm_2=lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k), norm_1=lambda x, d, k: x.norm(1, d, k),
      norm_3=lambda x, d, k: torch.linalg.vector_norm(x, 3, d, k), frobenius=lambda x, d, k: x.norm(dim=d, keepdim=k))
along(distinct, amax=torch.amax, amin=torch.amin, max_values=lambda x, d, k: x.max(d, k).values,
       median=lambda x, d, k: x.median(d, k).values,
      min_values=lambda x, d, k: x.min(d, k).values, kth_value=lambda x, d, k: x.kthvalue(1, d, k).values,
      maximum_norm=lambda x, d, k: x.abs().amax(d, k))
along(keep=False, cumsum=torch.cumsum, cumprod=lambda x, d: torch.cumprod(1 + 0.3 * x.sin(), d), softmax=torch.softmax,
       log_softmax=torch.log_softmax,
      softmin=F.softmin, logcumsumexp=torch.logcumsumexp, flip=lambda x, d: x.flip(d), roll=lambda x, d: x.roll(1, d),
      normalize=lambda x, d: F.normalize(x + 3, dim=d),
      centred=lambda x, d: x - x.mean(d, keepdim=True), stack=lambda x, d: torch.stack([x, x.sin()], d),
      repeat_interleave=lambda x, d: x.repeat_interleave(2, d),
      cat_with_itself=lambda x, d: torch.cat([x, 2 * x.cos()], d),
      cat_with_zeros=lambda x, d: torch.cat([torch.zeros_like(x), x], d),
      unbind_and_stack=lambda x, d: torch.stack(x.unbind(d)[::-1], d), unfold=lambda x, d: x.unfold(d, 1, 1),
      first=lambda x, d: x.select(d, 0),
      last_slice=lambda x, d: x.narrow(d, x.shape[d] - 1, 1), split_and_swap=lambda x, d: torch.cat(x.split(1, d)[::-1], d),
      index_select=lambda x, d: x.index_select(d, torch.arange(x.shape[d]).flip(0)), unsqueeze=lambda x, d: x.unsqueeze(d),
      fliplr_sum=lambda x, d: x + x.flip(d))
along(keep=False, least=2, diff=lambda x, d: x.diff(dim=d), every_other=lambda x, d: x.transpose(0, d)[::2].transpose(0, d),
       chunked_product=lambda x, d: (
    lambda a, b: a * b)(x.narrow(d, 0, x.shape[d] // 2), x.narrow(d, x.shape[d] - x.shape[d] // 2, x.shape[d] // 2)),
      window_mean=lambda x, d: x.unfold(d, 2, 1).mean(-1),
      shifted_product=lambda x, d: x.narrow(d, 1, x.shape[d] - 1) * x.narrow(d, 0, x.shape[d] - 1))
along(distinct, keep=False, sort=lambda x, d: x.sort(d).values, sort_descending=lambda x, d: x.sort(d, descending=True).values,
       topk=lambda x, d: x.topk(1, d).values,
      cummax=lambda x, d: x.cummax(d).values, cummin=lambda x, d: x.cummin(d).values,
      gather_sorted=lambda x, d: x.gather(d, x.detach().argsort(d)),
      take_largest=lambda x, d: torch.take_along_dim(x, x.detach().argmax(d, keepdim=True), d))


def whole(guard=None, **functions):
    for name, f in functions.items():
        OPERATIONS[name] = lambda draw, shape, f=f: Applied(f, guard=guard)


whole(sum_of_all=lambda x: x + x.sum(), mean_of_all=lambda x: x * x.mean(), flatten=lambda x: x.reshape(-1),
       tile=lambda x: x.tile(2), ravel_sin=lambda x: x.ravel().sin(),
      expand=lambda x: x.expand(2, *x.shape), squeeze=lambda x: x.squeeze(),
      masked_fill=lambda x: x.masked_fill(torch.arange(x.numel()).view(x.shape) % 3 == 0, 0.2),
      masked_select=lambda x: x[torch.arange(x.numel()).view(x.shape) % 2 == 0], clone_and_write=lambda x: _written(x),
      index_put=lambda x: _put(x), where_index=lambda x: torch.where(
          torch.arange(x.numel()).view(x.shape) % 2 == 0, x.sin(), x),
          take=lambda x: x.take(torch.tensor([0, x.numel() - 1, 0])),
          scaled_by_norm=lambda x: x / (1 + torch.linalg.vector_norm(x + 5)),
      layer_norm=lambda x: F.layer_norm(x, x.shape[-1:], eps=0.1) if x.dim() else x,
      rms_norm=lambda x: F.rms_norm(x, x.shape[-1:], eps=0.1) if x.dim() else x,
      repeat=lambda x: x.repeat(2, *[1] * max(x.dim() - 1, 0)), atleast_2d=torch.atleast_2d,
      softmax_of_all=lambda x: torch.softmax(x.reshape(-1), 0).view(x.shape))


def _written(x):
    out = x.clone()
    out.view(-1)[::2] = x.reshape(-1)[::2].cos()
    return out


def _put(x):
    flat = x.reshape(-1)
    return flat.index_put((torch.tensor([0, flat.numel() - 1]),), flat[:1] ** 2, accumulate=True)


# Matrices and images: shapes of some number of dims.

def shaped(dims, least=1, guard=None, square=False, **functions):
    for name, f in functions.items():
        def make(draw, shape, f=f):
            if len(shape) != dims or min(shape) < least or square and shape[-1] != shape[-2]:
                return None
            return Applied(f, guard=guard)

        OPERATIONS[name] = make


shaped(2, transpose=lambda x: x.t(), swapped_cos=lambda x: x.swapaxes(0, 1).cos(), gram_matrix=lambda x: x @ x.T,
       triu=torch.triu, tril=lambda x: x.tril(1), diagonal=lambda x: x.diagonal(),
       outer_of_rows=lambda x: torch.einsum("ni,nj->nij", x, x.cos()), rows_reversed=lambda x: x[list(range(len(x)))[::-1]],
       pad_constant=lambda x: F.pad(x, (1, 0, 0, 1), value=0.3),
       index_add=lambda x: torch.zeros(3, x.shape[1], dtype=x.dtype).index_add(0, torch.arange(len(x)) % 3, x),
       scatter_add=lambda x: torch.zeros_like(x).scatter_add(
           1, (torch.arange(x.numel()).view(x.shape) * 7) % x.shape[1], x),
           index_copy=lambda x: x.index_copy(0, torch.tensor([0]), x[-1:] ** 2), column_written=lambda x: _column(x),
       rot90=lambda x: x.rot90(), movedim=lambda x: x.movedim(0, 1), vstack=lambda x: torch.vstack([x, x[:1].exp()]),
       hstack=lambda x: torch.hstack([x.sin(), x[:, :1]]),
       einsum_trace=lambda x: torch.einsum("ij,ij->i", x, x.sin()),
       advanced_index=lambda x: x[torch.arange(len(x)), torch.arange(len(x)) % x.shape[1]],
       cosine=lambda x: F.cosine_similarity(x + 2, x.cos(), dim=1),
       group_norm=lambda x: F.group_norm(x, 1, eps=0.1),
       cdist=lambda x: torch.cdist(x, torch.tensor([[5.0] * x.shape[1]], dtype=x.dtype)),
       unflatten=lambda x: x.unflatten(1, (1, -1)),
       kron=lambda x: torch.kron(x[:1, :2], x[:2, :1]), tensordot=lambda x: torch.tensordot(x, x.sin(), dims=([1], [1])),
       solve=lambda x: torch.linalg.solve(_definite(x), x),
       determinant=lambda x: torch.linalg.det(_definite(x) / 4).reshape(1), inverse=lambda x: torch.linalg.inv(_definite(x)),
       cholesky=lambda x: torch.linalg.cholesky(_definite(x)),
       as_strided=lambda x: x.contiguous().as_strided((x.shape[1], x.shape[0]), (1, x.shape[1])),
       trace=lambda x: torch.trace(x).reshape(1))
shaped(2, least=2, batch_norm=lambda x: F.batch_norm(x, None, None, training=True, eps=0.1),
       pad_reflect=lambda x: F.pad(x[None], (1, 1), mode="reflect")[0],
       pad_circular=lambda x: F.pad(x[None], (1, 0), mode="circular")[0], glu=lambda x: F.glu(torch.cat([x, x.sin()], 1)),
       avg_pool=lambda x: F.avg_pool1d(x[None], 2, 1)[0],
       conv_by_itself=lambda x: F.conv1d(x[None], x[:, :2][None]),
       interpolate=lambda x: F.interpolate(x[None], scale_factor=2.0, mode="linear")[0],
       interpolate_nearest=lambda x: F.interpolate(x[None], scale_factor=2)[0],
       corner_differences=lambda x: x[1:, 1:] - x[:-1, :-1])
shaped(2, 2, distinct, max_pool=lambda x: F.max_pool1d(x[None], 2, 1)[0])
shaped(3, permute=lambda x: x.permute(2, 0, 1), bmm_transposed=lambda x: torch.bmm(x, x.mT),
       flatten_last=lambda x: x.flatten(1), matmul_broadcast=lambda x: x @ x[0].T, transpose_12=lambda x: x.transpose(1, 2),
       einsum_batched=lambda x: torch.einsum("bij,bkj->bik", x, x.cos()), diagonal_12=lambda x: x.diagonal(dim1=1, dim2=2),
       attention=lambda x: F.scaled_dot_product_attention(x, x, x), mean_of_two=lambda x: x.mean((0, 2)),
       sum_of_two_kept=lambda x: x.sum((1, 2), keepdim=True))


def _definite(x):
    """A well-conditioned square matrix of the size of x's rows."""
    return x @ x.T + 2 * torch.eye(len(x), dtype=x.dtype)


def _column(x):
    out = x.clone()
    out[:, 0] = x[:, -1] ** 2
    return out


# With parameters of their own.

@operation("linear")
def _(draw, shape):
    if not shape:
        return None
    k = draw.size()
    return Applied(F.linear, (draw.parameter(k, shape[-1]), draw.parameter(k)))


@operation("matmul-parameter")
def _(draw, shape):
    return Applied(torch.matmul, (draw.parameter(shape[-1], draw.size()),)) if shape else None


@operation("matmul-vector")
def _(draw, shape):
    return Applied(torch.matmul, (draw.parameter(shape[-1]),)) if shape else None


@operation("addmm")
def _(draw, shape):
    if len(shape) != 2:
        return None
    k = draw.size()
    return Applied(lambda x, b, W: torch.addmm(b, x, W, beta=0.5, alpha=1.5), (draw.parameter(k), draw.parameter(shape[1], k)))


@operation("scale-parameter")
def _(draw, shape):
    return Applied(torch.mul, (draw.parameter(*(shape[-1:] if draw.coin() else ())),))


@operation("exp-parameter")
def _(draw, shape):
    return Applied(lambda x, k: torch.exp(-k * k) * x, (draw.parameter(),))


@operation("prelu")
def _(draw, shape):
    return Applied(F.prelu, (draw.parameter(1),), away(0.0))


@operation("layer-norm-affine")
def _(draw, shape):
    if not shape:
        return None
    return Applied(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, eps=0.1),
                   (draw.parameter(shape[-1]), draw.parameter(shape[-1])))


@operation("conv1d")
def _(draw, shape):
    if len(shape) != 2 or shape[1] < 2:
        return None
    return Applied(lambda x, K, b: F.conv1d(x[None], K, b, padding=1)[0], (draw.parameter(2, shape[0], 2), draw.parameter(2)))


@operation("bilinear")
def _(draw, shape):
    return Applied(lambda x, W: F.bilinear(x, x.sin(), W), (draw.parameter(2, shape[-1], shape[-1]),)) if shape else None


@operation("embedding")
def _(draw, shape):
    if len(shape) != 2:
        return None
    index = torch.tensor([draw.integer(4) for _ in range(shape[0])])
    return Applied(lambda x, table: x + F.embedding(index, table), (draw.parameter(4, shape[1]),))


@operation("mixture")
def _(draw, shape):
    if not shape:
        return None
    return Applied(lambda x, W, V: torch.softmax(x @ V, -1)[..., :1] * (x @ W),
                   (draw.parameter(shape[-1], 2), draw.parameter(shape[-1], 3)))
