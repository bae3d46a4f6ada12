"""Every rule of the tape against the reference's explicit Jacobian."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, BACKENDS, gradient, jacobian_agreement, parameters, perturb, rand, relative
from tape.cases_complex import COMPLEX
from tape.cases_local import LOCAL, MAPS, MATRICES
from tape.cases_pointwise import POINTWISE
from tape.cases_selection import SELECTION, WRITES
from tape.layers import LAYERS, lstm_layer
from torch.nn.attention import SDPBackend, sdpa_kernel

from pgdfast import pde
from pgdfast.linear import Linearizer
from pgdfast.tape.rules import RULES, complex_numbers
from pgdfast.tape.walk import kind_of

aten = torch.ops.aten
C = rand(3, 4, seed=9)  # a constant
SINGLE = C.float()
MASK = C > 0
PARTS = (1, 3)
IDS = torch.tensor([[1, 0, 2], [2, 2, 1]])
PLACES = rand(3, 4, seed=8).argsort(1)
POINTS = rand(5, 3, seed=6)
SCORES = rand(2, 1, 3, 3, seed=7)
ALLOWED = torch.tensor([[True, False, True], [True, True, False], [False, False, True]])


# Functions of parameters a (3, 4), b (3, 4), c (4,), m (4, 5): a residual tensor or several.
ELEMENTWISE = {
    "tanh": lambda a, b, c, m: torch.tanh(a),
    "relu": lambda a, b, c, m: torch.relu(a),
    "gelu": lambda a, b, c, m: F.gelu(a),
    "gelu tanh": lambda a, b, c, m: F.gelu(a, approximate="tanh"),
    "silu": lambda a, b, c, m: F.silu(a),
    "mish": lambda a, b, c, m: F.mish(a),
    "sigmoid": lambda a, b, c, m: torch.sigmoid(a),
    "logsigmoid": lambda a, b, c, m: F.logsigmoid(a),
    "softplus": lambda a, b, c, m: F.softplus(a),
    "softplus with options": lambda a, b, c, m: F.softplus(a, beta=2.0, threshold=1.0),
    "elu": lambda a, b, c, m: F.elu(a, alpha=0.7),
    "elu in place": lambda a, b, c, m: F.elu(2.0 * a, alpha=0.7, inplace=True),
    "selu": lambda a, b, c, m: F.selu(a),
    "celu": lambda a, b, c, m: F.celu(a, alpha=0.5),
    "leaky_relu": lambda a, b, c, m: F.leaky_relu(a, 0.2),
    "leaky_relu in place": lambda a, b, c, m: F.leaky_relu(2.0 * a, 0.2, inplace=True),
    "hardtanh": lambda a, b, c, m: F.hardtanh(a, -0.5, 0.8),
    "softsign": lambda a, b, c, m: F.softsign(a),
    "sin": lambda a, b, c, m: torch.sin(a),
    "cos": lambda a, b, c, m: torch.cos(a),
    "tan": lambda a, b, c, m: torch.tan(a / 3),
    "sinh": lambda a, b, c, m: torch.sinh(a),
    "cosh": lambda a, b, c, m: torch.cosh(a),
    "atan": lambda a, b, c, m: torch.atan(a),
    "erf": lambda a, b, c, m: torch.erf(a),
    "exp": lambda a, b, c, m: torch.exp(a),
    "expm1": lambda a, b, c, m: torch.expm1(a),
    "log": lambda a, b, c, m: torch.log(a.abs() + 0.1),
    "log1p": lambda a, b, c, m: torch.log1p(a.abs()),
    "log2": lambda a, b, c, m: torch.log2(a.abs() + 0.1),
    "sqrt": lambda a, b, c, m: torch.sqrt(a.abs() + 0.1),
    "rsqrt": lambda a, b, c, m: torch.rsqrt(a.abs() + 0.1),
    "reciprocal": lambda a, b, c, m: torch.reciprocal(a.abs() + 0.1),
    "sign": lambda a, b, c, m: torch.sgn(a) * b,
    "clamp": lambda a, b, c, m: (a.clamp(-0.5, 0.5), a.clamp(min=0), b.clamp(max=0.3)),
    "clamp_min and clamp_max": lambda a, b, c, m: (
        torch.clamp_min(a, 0.1),
        torch.clamp_max(b, 0.1),
    ),
    "maximum and minimum": lambda a, b, c, m: (
        torch.maximum(a, b),
        torch.minimum(a, c),
        torch.maximum(C, b),
    ),
    "tied maximum and minimum": lambda a, b, c, m: (
        torch.maximum(a, a.detach()),
        torch.minimum(a.detach(), a),
    ),
    "where": lambda a, b, c, m: (
        torch.where(MASK, a, b),
        torch.where(MASK, a, 0.0),
        torch.where(MASK, C, c),
    ),
    "masked_fill": lambda a, b, c, m: (a.masked_fill(MASK, 1.0), c.masked_fill(MASK, 0.0)),
    "neg": lambda a, b, c, m: -a,
    "clone": lambda a, b, c, m: (
        a.clone(),
        aten.alias(b),
        aten.lift_fresh(2.0 * c),
        aten._to_copy(m),
    ),
    "add": lambda a, b, c, m: (
        a + b,
        a + c,
        c + a,
        a + C,
        C + c,
        torch.add(a, b, alpha=3),
        a + 2,
        0.5 + a,
    ),
    "add number": lambda a, b, c, m: (aten.add.Scalar(a, 2), aten.sub.Scalar(a, 2)),
    "add to itself": lambda a, b, c, m: a + a,
    "sub": lambda a, b, c, m: (
        a - b,
        a - c,
        c - a,
        a - C,
        C - c,
        torch.sub(a, b, alpha=3),
        a - 2,
        0.5 - a,
    ),
    "rsub": lambda a, b, c, m: (
        torch.rsub(a, b, alpha=2),
        torch.rsub(a, C),
        torch.rsub(a, 2, alpha=3),
    ),
    "mul": lambda a, b, c, m: (
        a * b,
        a * c,
        c * a,
        a * C,
        C * c,
        a * 3,
        0.1 * a,
        a * a,
        aten.mul.Scalar(a, 0.3),
    ),
    "div": lambda a, b, c, m: (
        a / (b.abs() + 1),
        a / (c.abs() + 1),
        a / (2 + C),
        C / (c.abs() + 1),
        1 / (a.abs() + 1),
    ),
    "div by number": lambda a, b, c, m: (
        a / 7,
        b / 0.3,
        aten.div.Scalar(a, 7),
        c / torch.tensor(7),
    ),
    "div by other dtypes": lambda a, b, c, m: (
        a / torch.tensor([3, 7, 9, 11]),
        a / torch.tensor([0.1, 0.3, 0.7, 2]),
    ),
    "mul by other dtypes": lambda a, b, c, m: (
        a * torch.tensor([3, 7, 9, 11]),
        a * MASK,
        a * SINGLE,
    ),
    "addcmul": lambda a, b, c, m: (
        torch.addcmul(a, b, c, value=0.3),
        torch.addcmul(C, C, c),
        torch.addcmul(a, C, C),
    ),
    "powers": lambda a, b, c, m: (
        a**2,
        a**3,
        a**1,
        a**0,
        a.square(),
        (a.abs() + 0.1) ** 0.5,
        (a.abs() + 1) ** -2,
    ),
    "power of tensors": lambda a, b, c, m: (
        (a.abs() + 0.1) ** b,
        (a.abs() + 0.1) ** C,
        (C.abs() + 0.1) ** c,
    ),
    "power of number": lambda a, b, c, m: (2.0**a, 0.3**c, 3**b),
    "numbers in a row": lambda a, b, c, m: 1 - 2 * (a / 3 - 0.5) ** 2 / 7 + 0.1,
}
STRUCTURAL = {
    "view": lambda a, b, c, m: (
        a.view(4, 3),
        a.reshape(-1),
        a.flatten(),
        m.T.reshape(5, 2, 2),
        a.unflatten(1, (2, 2)),
    ),
    "reshape of windows": lambda a, b, c, m: (
        a.T.reshape(-1),
        a[:, 1:3].reshape(6),
        aten._reshape_alias(a, (12,), (1,)),
    ),
    "transpose": lambda a, b, c, m: (
        a.t() * 2,
        a.T,
        a.mT,
        a.transpose(-1, -2),
        a.view(3, 2, 2).transpose(0, -1),
    ),
    "permute": lambda a, b, c, m: (
        a.view(3, 2, 2).permute(2, 0, 1),
        a.view(3, 2, 2).permute(-1, 0, -2),
        a.movedim(0, 1),
    ),
    "slice": lambda a, b, c, m: (
        a[1:],
        a[:, -2:],
        a[:-1, ::2],
        m[1:4:2, 1:-1],
        a[0:0],
        a[..., -3:-1],
        c[5:],
    ),
    "narrow": lambda a, b, c, m: (a.narrow(0, 1, 2), a.narrow(-1, -2, 2)),
    "select": lambda a, b, c, m: (
        a[1],
        a[-1],
        a[:, -2],
        c[0].reshape(1),
        m[2, -1].view(1),
        a.select(-1, -1),
    ),
    "diagonal": lambda a, b, c, m: (
        a.diagonal(),
        m.diagonal(1),
        m.diagonal(-1, 1, 0),
        a.view(3, 2, 2).diagonal(0, -2, -1),
    ),
    "cat": lambda a, b, c, m: (
        torch.cat([a, b]),
        torch.cat([a, c.view(4, 1).T], 0),
        torch.cat([a, b.T.reshape(3, 4)], -1),
    ),
    "cat with constants": lambda a, b, c, m: (
        torch.cat([C, a]),
        torch.cat([a, C, b], -1),
        torch.cat([a[:, :1], C[:, :2], b], 1),
        torch.cat([C[0], c]),
    ),
    "stack": lambda a, b, c, m: (
        torch.stack([a, b]),
        torch.stack([a, C, b], -1),
        torch.stack([C, C, b], 1),
        torch.vstack([a, b]),
        torch.hstack([a, C]),
    ),
    "split": lambda a, b, c, m: (
        *a.split(3, -1),
        *m.split(PARTS, 0),
        m.split(2)[1],
        *torch.tensor_split(a, 2),
    ),
    "chunk": lambda a, b, c, m: (*a.chunk(2, 1), c.chunk(3)[-1], a.chunk(3, -1)[0]),
    "unbind": lambda a, b, c, m: (*a.unbind(), a.unbind(-1)[2], *a.view(3, 2, 2)),
    "expand": lambda a, b, c, m: (
        c.expand(3, 4) * C,
        a[:1].expand(3, -1),
        c[:1].expand(4),
        a.view(3, 1, 4).expand(3, 2, 4),
    ),
    "broadcast": lambda a, b, c, m: (
        a[:, :1] * c,
        torch.broadcast_to(c, (2, 3, 4)) + a,
        a[:1] + b[:, :1],
    ),
    "repeat": lambda a, b, c, m: (
        c.repeat(3),
        c.repeat(3, 1),
        a.repeat(2, 1, 2),
        a.T.repeat(1, 2),
        a[0, 0].repeat(3),
    ),
    "tile": lambda a, b, c, m: (c.tile(2), a.tile((2,)), c.tile(3, 1)),
    "squeeze": lambda a, b, c, m: (
        a.view(3, 1, 4, 1).squeeze(),
        a.view(3, 1, 4).squeeze(1),
        a.view(1, 3, 4, 1).squeeze((0, -1)),
        a.squeeze(),
        a.squeeze(0),
    ),
    "squeeze in place": lambda a, b, c, m: (
        (2.0 * a).view(3, 1, 4, 1).squeeze_(),
        (2.0 * a).view(3, 1, 4).squeeze_(1),
        (2.0 * b).view(1, 3, 4, 1).squeeze_((0, -1)),
    ),
    "unsqueeze": lambda a, b, c, m: (a.unsqueeze(0), a.unsqueeze(-1), a[:, None, :], c[None]),
    "sum": lambda a, b, c, m: (
        a.sum(0),
        a.sum(1, keepdim=True),
        a.sum((0, -1), keepdim=True),
        a.sum().view(1),
        m.T.sum(-2),
    ),
    "mean": lambda a, b, c, m: (
        a.mean(0),
        a.mean(-1, keepdim=True),
        a.mean((-1, 0)).view(1),
        a.mean().view(1),
        m.T.mean(1),
    ),
    "mean of some dimensions": lambda a, b, c, m: (
        a.view(3, 2, 2).mean((0, 2)),
        a.view(3, 2, 2).sum((-1, 0)),
    ),
    "centred": lambda a, b, c, m: a - a.mean(0) + (b - b.mean(1, keepdim=True)),
    "empty": lambda a, b, c, m: (a[:0] * c, a),
}
PRODUCTS = {
    "mm": lambda a, b, c, m: (a @ m, a @ C.T, C @ m, a @ b.T, a.T @ b, a @ a.T),
    "linear": lambda a, b, c, m: (
        F.linear(a, b, c[:3]),
        F.linear(C, m.T, m[0]),
        F.linear(C, b),
        F.linear(a, C, C[:, 0]),
    ),
    "addmm": lambda a, b, c, m: (
        torch.addmm(m[0], a, m, alpha=0.3, beta=2),
        torch.addmm(C, C, rand(4, 4), beta=3) + a,
        torch.addmm(a, C, m @ m.T),
    ),
    "mv": lambda a, b, c, m: (a @ c, C @ c, a @ C[0], m.T @ c, torch.mv(a[:, ::2], c[::2])),
    "vector times matrix": lambda a, b, c, m: (c @ m, C[0] @ m, c @ C.T),
    "dot": lambda a, b, c, m: (
        torch.dot(c, a[0]).view(1),
        torch.dot(c, C[0]).view(1),
        (C[0] @ c).view(1),
        (c @ c).view(1),
    ),
    "bmm": lambda a, b, c, m: (
        torch.bmm(a.view(3, 2, 2), b.view(3, 2, 2)),
        torch.bmm(C.view(3, 2, 2), a.view(3, 2, 2)),
        a.view(3, 2, 2) @ C.view(3, 2, 2),
    ),
    "baddbmm": lambda a, b, c, m: torch.baddbmm(
        b.view(3, 2, 2), a.view(3, 2, 2), C.view(3, 2, 2), alpha=0.3, beta=2
    ),
    "stacks of matrices": lambda a, b, c, m: (
        a.view(3, 1, 4) @ m,
        C.view(3, 2, 2) @ a.view(3, 2, 2)[:1],
        a.view(3, 2, 2) @ c[:2],
    ),
    "linear of a stack": lambda a, b, c, m: F.linear(C.view(3, 1, 4).expand(3, 2, 4), a, b[:, 0]),
    "einsum": lambda a, b, c, m: (
        torch.einsum("ij,kj->ik", a, b),
        torch.einsum("ij,jk->k", C, m),
        torch.einsum("ij,ij->i", a, b),
        torch.einsum("i,j->ij", c, c),
    ),
    "outer": lambda a, b, c, m: torch.outer(c, a[0]),
    "attention by hand": lambda a, b, c, m: torch.exp(a @ b.T / 2) @ C,
    "window on a product": lambda a, b, c, m: (a @ m)[1:, ::2] * (C @ m)[:2, ::2],
    "strided operands": lambda a, b, c, m: (
        C[:, ::2] @ m[::2],
        a[:, ::2] @ m[::2, ::2],
        a[::2] @ m[:, ::3],
    ),
    "broadcast operand": lambda a, b, c, m: (c.expand(3, 4) @ m, C @ c[:, None].expand(4, 2)),
    "tied weights": lambda a, b, c, m: torch.tanh(torch.tanh(C @ m) @ m.T) @ m + a.sum(),
    "one weight thrice": lambda a, b, c, m: (C @ m @ m.T @ m, m * m, c),
    "parameters as residuals": lambda a, b, c, m: (a, 0.1 * c, m.T, a),
    "mlp": lambda a, b, c, m: F.linear(
        torch.tanh(F.linear(torch.tanh(F.linear(C, a, a[:, 0])), b.T, c)), m.T
    ),
}


def nested(act):
    """act'(x) and act''(x) of a layer, through nested autograd.grad."""

    def function(a, b, c, m):
        x = C.clone().requires_grad_()
        first = gradient(act(F.linear(x, a, c[:3])), x)
        second = gradient(first * b, x)
        return first, second

    return function


NESTED = {f"derivatives of {name}": nested(act) for name, act in ACTIVATIONS.items()} | {
    "derivative of windows": lambda a, b, c, m: (
        gradient((torch.tanh(a[1:, ::2]) ** 2 * b[0, -1]), a) * b
    ),
    "derivative of select": lambda a, b, c, m: gradient(torch.sin(a[:, -1] * a[0, 1]), a) * b,
    "derivative of cat": lambda a, b, c, m: (
        gradient(torch.cat([a, C, b], -1) ** 3, a) + gradient(torch.stack([a, a * b]) ** 3, b)
    ),
    "derivative of sums": lambda a, b, c, m: (
        gradient(a.sum(0) ** 3, a),
        gradient(b.mean(1) ** 3, b),
        gradient(a.mean() ** 3, a),
    ),
}


def heads(x):
    """A (3, 4) matrix as (batch, heads, length, width) = (2, 1, 3, 2)."""
    return x.reshape(3, 2, 1, 2).permute(1, 2, 0, 3)


def attend(a, b, m, **options):
    """Attention with queries, keys and values from parameters."""
    return F.scaled_dot_product_attention(heads(a), heads(b), heads(torch.tanh(m[:3, :4])), **options)


def attend_plainly(a, b, m, **options):
    """The same by its parts."""
    with sdpa_kernel(SDPBackend.MATH):
        return attend(a, b, m, **options)


NORMALIZING = {
    "softmax": lambda a, b, c, m: (a.softmax(1), (2 * b).softmax(0), c.softmax(0), (a @ m).softmax(-1)),
    "softmax of stacks": lambda a, b, c, m: (
        a.view(3, 2, 2).softmax(1),
        a.view(3, 2, 2).softmax(-1),
        (a.T.reshape(2, 2, 3) * 2).softmax(0),
        c.expand(3, 4).softmax(1),
        c[:, None].expand(4, 3).softmax(1) + a.sum(),
    ),
    "softmax of masked scores": lambda a, b, c, m: (
        (a @ b.T).masked_fill(~ALLOWED, -torch.inf).softmax(-1),
        aten._safe_softmax((a @ b.T).masked_fill(ALLOWED[:1], -torch.inf), -1),
    ),
    "log_softmax": lambda a, b, c, m: (a.log_softmax(1), (2 * a).log_softmax(0), c.log_softmax(-1)),
    "logsumexp": lambda a, b, c, m: (a.logsumexp(1), b.logsumexp((0, -1)).view(1), b.logsumexp(0, keepdim=True)),
    "layer_norm": lambda a, b, c, m: (
        F.layer_norm(a, (4,), c, m[:, 0]),
        F.layer_norm(2 * a, (4,)),
        F.layer_norm(a.view(3, 2, 2), (2, 2), c.view(2, 2)),
        F.layer_norm(C, (4,), c),
        F.layer_norm(a @ m, (5,), None, m[0]),
    ),
    "layer_norm of windows": lambda a, b, c, m: (
        F.layer_norm(a.T, (3,), a[:, 0]),
        F.layer_norm(a.view(3, 2, 2).transpose(0, 1), (3, 2)),
        F.layer_norm((a @ m)[:, ::2], (3,)),
    ),
    "rms_norm": lambda a, b, c, m: (F.rms_norm(a, (4,), c), F.rms_norm(2 * b, (4,))),
    "attention": lambda a, b, c, m: (attend(a, b, m), attend(a, C, m, scale=0.3), attend(C, C, m), attend(C, b, m)),
    "attention with masks": lambda a, b, c, m: (
        attend(a, b, m, is_causal=True),
        attend(a, b, m, attn_mask=ALLOWED),
        attend(a, b, m, attn_mask=SCORES),
        attend(a, b, m, attn_mask=ALLOWED & ~ALLOWED[:1]),
    ),
    "attention by parts": lambda a, b, c, m: (
        attend_plainly(a, b, m),
        attend_plainly(a, b, m, is_causal=True),
        attend_plainly(a, b, m, attn_mask=SCORES),
        attend_plainly(a, b, m, attn_mask=ALLOWED & ~ALLOWED[:1]),
    ),
    "attention with a learned mask": lambda a, b, c, m: attend(a, b, m, attn_mask=a[:, :3]),
    "maxima": lambda a, b, c, m: (
        a.amax(1),
        a.amin((0, -1)).view(1),
        b.amax(0, keepdim=True),
        a.max().view(1),
        b.min().view(1),
        torch.amax(torch.stack([a, a, b]), 0),
    ),
}
GATHERS = {
    "embedding": lambda a, b, c, m: (
        F.embedding(IDS, a),
        F.embedding(IDS, a, padding_idx=2),
        F.embedding(IDS, a[:, 1:3]),
        F.embedding(IDS, m.T),
        F.embedding(IDS[0], 2 * a) @ m,
        F.embedding(IDS, b) @ m,
        F.embedding(IDS[:0], a),
    ),
    "index": lambda a, b, c, m: (
        a[IDS],
        a[:, IDS],
        a[IDS[0], :2],
        a[IDS[0], -IDS[1]],
        a.view(3, 2, 2)[:, IDS[:, :2] // 2, -1],
        a.view(3, 2, 2)[IDS[0], :, IDS[1] // 2],
        (2 * a)[torch.tensor([0, -1])],
    ),
    "index by masks": lambda a, b, c, m: (a[MASK], a[:, MASK[0]], (a * b)[MASK[:, 1]], a.T[MASK.T]),
    "index_select": lambda a, b, c, m: (
        a.index_select(1, IDS[0]),
        m.index_select(0, IDS[1]),
        (a @ m).index_select(-2, IDS[0]),
        (2 * c).index_select(0, IDS[1]),
    ),
    "gather": lambda a, b, c, m: (
        a.gather(1, PLACES),
        a.gather(0, IDS[:, [0, 1, 2, 0]]),
        torch.take_along_dim(2 * a, PLACES[:, :1], 1),
        c.gather(0, IDS[0]),
    ),
    "masked_select": lambda a, b, c, m: (a.masked_select(MASK), c.masked_select(MASK), (2 * a).masked_select(MASK[0])),
    "take": lambda a, b, c, m: (a.take(IDS), a.T.take(-IDS - 1), (a * b).take(IDS)),
    "sorted": lambda a, b, c, m: (
        a.sort(1)[0],
        (2 * a).sort(0, descending=True)[0],
        a.topk(2, 1)[0],
        b.topk(2, 0, largest=False)[0],
        c.sort()[0],
    ),
    "largest": lambda a, b, c, m: (a.max(1)[0], b.min(0, keepdim=True)[0], (a @ m).max(-1)[0], a.sum().max(0)[0].view(1)),
    "triangles": lambda a, b, c, m: (a.tril(), a.triu(1), m.view(2, 2, 5).tril(-1), (a @ m).triu(-1)),
    "dropout": lambda a, b, c, m: (
        drop(a, 0.4),
        drop(a @ m, 0.5),
        torch.native_dropout(a, 1.0, True)[0],
        torch.native_dropout(a, 0.0, False)[0],
    ),
    "glu": lambda a, b, c, m: (F.glu(a), F.glu(2 * b), F.glu(m, 0), F.glu(c)),
}


def drop(x, p):
    """Dropout whose mask is the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return torch.native_dropout(x, p, True)[0]


TAYLOR = {
    "taylor mode": lambda a, b, c, m: pde.laplacian(lambda x: torch.tanh(F.linear(x, a.T, c)) @ m, POINTS).laplacian,
    "taylor mode, more layers": lambda a, b, c, m: pde.jet(
        lambda x: torch.sin(2 * torch.tanh(x @ a) @ b.T) @ (a + b), POINTS, [0, 2], order=[1, 2]).second[0],
}


TABLES = (
    ELEMENTWISE, STRUCTURAL, PRODUCTS, NESTED, NORMALIZING, GATHERS, TAYLOR, POINTWISE, SELECTION, WRITES, LOCAL, MATRICES,
    MAPS, LAYERS, COMPLEX,
)
CASES = {name: case for table in TABLES for name, case in table.items()}


# Backward passes that round a number to float32: 1 / alpha and 1 / 6. {name: (function, its derivative)}.
INEXACT = {
    "celu": (lambda x: F.celu(x, 1.3), lambda x: torch.where(x > 0, 1.0, torch.exp(x / 1.3))),
    "celu in place": (lambda x: F.celu(1.0 * x, 1.3, inplace=True), lambda x: torch.where(x > 0, 1.0, torch.exp(x / 1.3))),
    "hardsigmoid": (lambda x: F.hardsigmoid(4 * x), lambda x: ((4 * x).abs() < 3) * x.new_tensor(4 / 6)),
}


def problem(name):
    """A case's parameters and closure."""
    params = parameters((3, 4), (3, 4), (4,), (4, 5))

    def closure():
        result = CASES[name](*params)
        return tuple(result) if isinstance(result, tuple) else result

    return closure, params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_rule_agrees_with_the_reference(name, backend):
    closure, params = problem(name)
    linearizer = Linearizer(params, backend)
    for visit in range(2):  # the second visit only re-reads the tape's tensors
        assert jacobian_agreement(linearizer, closure, params, seed=visit) < 1e-12
        perturb(params, seed=visit)
    assert len(linearizer._plans) == 1


def operations(result):
    """Names of the tape's nodes below a closure's result."""
    seen, stack = {}, [t.grad_fn for t in (result if isinstance(result, tuple) else (result,))]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen[node] = kind_of(node).removesuffix("_copy")
            stack.extend(child for child, _ in node.next_functions)
    return set(seen.values()) - {"AccumulateGrad"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", INEXACT)
def test_rule_has_the_exact_derivative(name, backend):
    function, derivative = INEXACT[name]
    x = torch.linspace(-2.1, 2.2, 24, dtype=torch.float64).requires_grad_()
    linearizer = Linearizer([x], backend)
    for _ in range(2):
        assert relative(linearizer(lambda: function(x)).dense(), torch.diag(derivative(x.detach()))) < 1e-15


def test_every_rule_is_exercised():
    assert len(CASES) == sum(map(len, TABLES))   # no two cases of one name
    x = torch.ones(2, requires_grad=True)
    exercised = set().union(
        *(operations(problem(name)[0]()) for name in CASES), *(operations(function(x)) for function, _ in INEXACT.values()),
        operations(lstm_layer()),
    )
    in_a_group = {"torch.nn.parallel.distributed._DDPSinkBackward"}   # tests/parts/test_parts_ranks.py has it
    known = set(RULES) - in_a_group | complex_numbers.NODES
    assert exercised == known, f"rules without a case: {sorted(known - exercised)}"
