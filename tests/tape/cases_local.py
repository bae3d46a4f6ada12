"""Cases for operations on small groups and linear maps: functions of a (3, 4), b (3, 4), c (4,), m (4, 5)."""

import torch
import torch.nn.functional as F
from helpers import gradient, rand
from tape.cases_selection import first, image, quiet, several, volume

aten = torch.ops.aten
C = rand(3, 4, seed=9)   # a constant
STACK = rand(2, 3, 3, seed=10)
SPARSE = torch.where(rand(5, 3, seed=11) > 0.3, rand(5, 3, seed=12), 0.0).to_sparse()


def stack(a, b):
    """Two well-conditioned 3 x 3 matrices of parameters."""
    return 3 * torch.eye(3, dtype=a.dtype) + torch.stack([a[:, :3], torch.tanh(b[:, 1:])])


def symmetric(a, b):
    """The same, symmetric."""
    x = stack(a, b)
    return x + x.mT + 2 * torch.diag(torch.arange(3, dtype=a.dtype))


def definite(a, b):
    """The same, positive definite."""
    x = stack(a, b)
    return x @ x.mT


LOCAL = {
    "norms": lambda a, b, c, m: (
        torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(a, 3, dim=0, keepdim=True), a.norm(dim=1), a.norm(1, 0),
        torch.linalg.vector_norm(b, 1, dim=(0, 1)).view(1), a.norm().view(1), torch.linalg.vector_norm(c, torch.inf).view(1),
        aten.norm.Scalar(a, 3).view(1), aten.norm.ScalarOpt_dim(a, 3, [1]),
        aten.norm.ScalarOpt_dtype(a, 3, dtype=a.dtype).view(1),
        aten.norm.ScalarOpt_dim_dtype(a, 2, [1], False, dtype=a.dtype)),
    "normalize": lambda a, b, c, m: (
        F.normalize(2 * b + C, dim=1), F.cosine_similarity(a, b), F.pairwise_distance(a, C), torch.dist(a, b, 3).view(1),
        F.normalize(C @ m)),
    "products": lambda a, b, c, m: (a.prod(1), a.prod(0, keepdim=True), c.prod().view(1), (a * 0 + 1).prod(1) + b.prod(1)),
    "variances": lambda a, b, c, m: (
        a.var(1), a.std(0, keepdim=True), a.var().view(1), a.std((0, 1), correction=0).view(1), *torch.var_mean(a, 1),
        torch.std_mean(b, 0)[0], torch.std_mean(b, 0, keepdim=True)[1], torch.nansum(a, 1), torch.nansum(a).view(1)),
    "extrema": lambda a, b, c, m: (
        *torch.aminmax(a, dim=1), torch.aminmax(b).min.view(1), torch.aminmax(c, dim=0, keepdim=True)[1],
        c.median().view(1), a.nanmedian().view(1)),
    "running": lambda a, b, c, m: (
        a.cumsum(0), torch.tanh(a).cumsum(-1), c.cumsum(0), a.cumprod(1), (C @ m).cumprod(0), a.logcumsumexp(1),
        torch.tanh(b).logcumsumexp(0), a.view(3, 2, 2).cumsum(1), a.sum().cumsum(0).view(1), a.sum().logcumsumexp(0).view(1),
        a.sum().cumprod(0).view(1)),
    "running with zeros": lambda a, b, c, m: (a * (C > 0)).cumprod(1),
    "differences": lambda a, b, c, m: (torch.diff(a), torch.diff(a, dim=0, n=2), torch.trapezoid(a, dx=0.3),
        torch.gradient(a[0])[0]),
    "cross": lambda a, b, c, m: (
        torch.linalg.cross(a[:, :3], b[:, :3]), torch.cross(a, C, 0), torch.linalg.cross(a.T, c[:3].expand(4, 3)),
        torch.linalg.cross(a[:, :3], c[:3][None])),
    "renorm": lambda a, b, c, m: (a.renorm(2, 0, 1.0), torch.tanh(b).renorm(1, 1, 0.5)),
    "softmax derivatives": several(
        first(lambda x: x.softmax(1)), first(lambda x: x.log_softmax(1)), first(lambda x: x.softmax(0)), first(F.glu),
        lambda a, b, c, m: gradient(F.glu(a * c), c)),
    "losses by element": lambda a, b, c, m: (
        F.huber_loss(a, C, reduction="none"), F.smooth_l1_loss(a, b, reduction="none"), F.mse_loss(a, b, reduction="none"),
        F.binary_cross_entropy(torch.sigmoid(a), torch.sigmoid(C), reduction="none"),
        F.soft_margin_loss(a, C.sign(), reduction="none"),
        F.binary_cross_entropy_with_logits(a, torch.sigmoid(b), reduction="none", pos_weight=torch.sigmoid(C[0]))),
    "derivatives of losses": several(
        *(first(lambda x, loss=loss: loss(x, C, reduction="none")) for loss in (F.huber_loss, F.smooth_l1_loss, F.mse_loss)),
        first(lambda x: F.binary_cross_entropy(torch.sigmoid(x), torch.sigmoid(C), reduction="none")),
        first(lambda x: F.soft_margin_loss(x, C.sign(), reduction="none"))),
    "derivatives of layer norm": several(
        first(lambda x: F.layer_norm(x, (4,))), lambda a, b, c, m: first(lambda x: F.layer_norm(x, (4,), c, c))(a, b, c, m),
        lambda a, b, c, m: gradient(F.layer_norm(a, (4,), c) ** 3, a) * b),
    "losses as numbers": lambda a, b, c, m: torch.stack([
        F.huber_loss(a, C), F.smooth_l1_loss(a, b), F.mse_loss(a, b),
        F.binary_cross_entropy(torch.sigmoid(a), torch.sigmoid(C)),
        F.soft_margin_loss(a, C.sign()), F.binary_cross_entropy_with_logits(a, torch.sigmoid(b)), F.l1_loss(a, b)]),
    "losses by class": lambda a, b, c, m: (
        F.cross_entropy(a, torch.tensor([1, 0, 3]), reduction="none"),
        F.nll_loss(a.log_softmax(1), torch.tensor([1, -100, 3])).view(1),
        F.multi_margin_loss(a, torch.tensor([1, 0, 3]), reduction="none"),
        F.multi_margin_loss(b, torch.tensor([1, 0, 3])).view(1),
        F.multilabel_margin_loss(a, torch.tensor([[1, 0, -1, 0]] * 3), reduction="none"),

        F.nll_loss(torch.stack([a, b])[None], torch.tensor([[[1, 0, 1, 0]] * 3]), reduction="none")),
}
MATRICES = {
    "inverses": lambda a, b, c, m: (
        torch.linalg.inv(stack(a, b)), torch.linalg.inv(stack(a, b)[0]), torch.linalg.pinv(stack(a, b)),
        torch.inverse(stack(a, b))),
    "determinants": lambda a, b, c, m: (
        torch.linalg.det(stack(a, b)), torch.linalg.slogdet(stack(a, b))[1], torch.logdet(definite(a, b)),
        torch.det(stack(a, b)[1]).view(1)),
    "solutions": lambda a, b, c, m: (
        torch.linalg.solve(stack(a, b), STACK), torch.linalg.solve(STACK, stack(a, b)[:, :, :2]),
        torch.linalg.solve(stack(a, b), a.T[:2]),
        torch.linalg.solve(stack(a, b)[0], b[:, 0]), torch.linalg.solve(stack(a, b)[0], b), torch.linalg.solve(stack(a, b), b),
        torch.linalg.solve(stack(a, b), STACK[0], left=False)),
    "least squares": lambda a, b, c, m: (
        torch.linalg.lstsq(a.T, b.T)[0], torch.linalg.lstsq(torch.stack([a.T, b.T]), C.T[:, :2].expand(2, 4, 2))[0]),
    "larger matrices": lambda a, b, c, m: (
        torch.linalg.inv(stack(a, b)[:, None]), torch.linalg.solve(stack(a, b)[:, None], rand(3, 3, 2, seed=2)),
        torch.linalg.cholesky(definite(a, b), upper=True), torch.linalg.solve(stack(a, b)[0], STACK)),
    "triangular solutions": lambda a, b, c, m: (
        torch.linalg.solve_triangular(stack(a, b), STACK, upper=True, unitriangular=True),
        torch.linalg.solve_triangular(stack(a, b).tril(), b, upper=False),
        torch.linalg.solve_triangular(stack(a, b), STACK, upper=False, left=False),
        torch.linalg.solve_triangular(stack(a, b).triu(), STACK, upper=True),
        torch.linalg.solve_triangular(STACK.tril(), stack(a, b), upper=False)),
    "Cholesky": lambda a, b, c, m: (
        torch.linalg.cholesky(definite(a, b)), torch.cholesky_inverse(definite(a, b)[0]),
        torch.cholesky_solve(b, torch.linalg.cholesky(definite(a, b)[0]))),
    "deprecated": quiet(lambda a, b, c, m: (
        torch.cholesky(definite(a, b)[0]), torch.triangular_solve(b, stack(a, b)[0].triu())[0])),
    "eigenvalues": lambda a, b, c, m: (
        torch.linalg.eigvalsh(symmetric(a, b)), torch.linalg.eigh(symmetric(a, b))[1] ** 2, torch.linalg.svdvals(stack(a, b)),
        torch.linalg.matrix_norm(stack(a, b), 2), torch.linalg.matrix_norm(a, "nuc").view(1)),
    "factors": lambda a, b, c, m: (
        *torch.linalg.qr(stack(a, b)), *torch.linalg.lu(stack(a, b))[1:], torch.linalg.lu_factor(stack(a, b))[0],
        torch.linalg.qr(a.T)[1], torch.linalg.householder_product(torch.linalg.qr(C.T)[0].tril(-1) * a.T, c[:3])),
    "unpacked factors": lambda a, b, c, m: (
        *torch.lu_unpack(*torch.linalg.lu_factor(stack(a, b)))[1:],
        torch.linalg.lu_solve(*torch.linalg.lu_factor(stack(a, b)), STACK),
        torch.linalg.lu_solve(*torch.linalg.lu_factor(STACK), stack(a, b)),
        torch.ormqr(C.T.tril(-1) * a.T, c[:3], b.T),
        torch.addbmm(m[:2, :2], a.view(3, 2, 2), b.view(3, 2, 2), alpha=0.3, beta=2)),
    "exponentials": lambda a, b, c, m: (
        torch.linalg.matrix_exp(stack(a, b) / 3), torch.linalg.matrix_power(stack(a, b), 3), torch.kron(a, b[:2, :2])),
    "products with sums": lambda a, b, c, m: (
        torch.addmv(a[:, 0], b, c, alpha=0.3, beta=2), torch.addmv(C[:, 0], C, c), torch.addr(C, b[:, 0], c, beta=0.5, alpha=2),
        torch.addr(a, C[:, 0], c), torch.addr(C, b[:, 0], C[0]), torch.vdot(c, a[0]).view(1)),
    "sparse matrices": lambda a, b, c, m: (
        torch.sparse.mm(SPARSE, a), SPARSE @ torch.tanh(b), SPARSE @ a[:, 0], SPARSE.T @ m.T,
        torch.addmm(m.T[:, :4], SPARSE, b, alpha=0.3),
        torch.sparse.addmm(torch.zeros(5, 4, dtype=a.dtype), SPARSE, a, alpha=2)),
    "distances": lambda a, b, c, m: (
        torch.cdist(a, b), torch.cdist(a, m[:, :4], p=1), torch.cdist(a, C, p=3), torch.cdist(a, b, p=torch.inf),
        torch.cdist(a, a),
        torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"), torch.pdist(a), torch.pdist(a, 1.5), torch.cdist(a, C, p=1.5),
        torch.cdist(torch.stack([a, b]), C[None], p=2.5)),
    "three factors": lambda a, b, c, m: (
        F.bilinear(a, C, m[:2, :4].reshape(1, 2, 4).expand(4, 2, 4).permute(1, 0, 2)),
        F.bilinear(a, b, rand(2, 4, 4, seed=3), c[:2])),
    "bags": lambda a, b, c, m: (
        F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), a), F.embedding_bag(torch.tensor([0, 1, 2, 2, 1]), a,
        torch.tensor([0, 3]), mode="sum"),
        F.embedding_bag(torch.tensor([0, 1, 2, 2, 1]), 2 * b, torch.tensor([0, 3, 3]), mode="sum",
        per_sample_weights=rand(5, seed=2)),
        F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), a, padding_idx=1),
        F.embedding_bag(torch.tensor([0, 1, 2, 2, 1]), a, torch.tensor([0, 3]), mode="sum", per_sample_weights=m.view(-1)[:5]),
        F.embedding_bag(torch.tensor([0, 1, 2, 2, 1]), a * b, torch.tensor([0, 3, 3]), mode="max")),
}
MAPS = {
    "interpolation": lambda a, b, c, m: (
        F.interpolate(a[None], size=7, mode="linear"), F.interpolate(a[None], size=2, mode="linear", align_corners=True),
        F.interpolate(image(a), size=(5, 7), mode="bilinear"),
        F.interpolate(image(m), scale_factor=1.5, mode="bilinear", align_corners=True),
        F.interpolate(image(m), size=(7, 3), mode="bicubic"), F.interpolate(image(m), size=(2, 3), mode="bilinear",
        antialias=True),
        F.interpolate(image(m), size=(2, 3), mode="bicubic", antialias=True),
        F.interpolate(volume(a), size=(3, 4, 5), mode="trilinear")),
    "interpolation of stacks": lambda a, b, c, m: F.interpolate(torch.stack([a, b, a * b])[:, None], scale_factor=2,
        mode="bilinear"),
    "derivatives of interpolation": several(
        first(lambda x: F.interpolate(x[None], size=7, mode="linear")),
        first(lambda x: F.interpolate(x[None, None], size=(5, 7), mode="bilinear")),
        first(lambda x: F.interpolate(x[None, None], size=(4, 3), mode="bicubic")),
        first(lambda x: F.interpolate(x[None, None], size=(2, 3), mode="bilinear", antialias=True)),
        first(lambda x: F.interpolate(x[None, None], size=(2, 3), mode="bicubic", antialias=True)),
        first(lambda x: F.interpolate(x.view(1, 1, 2, 2, 3), scale_factor=2, mode="trilinear"))),
    "sampling": lambda a, b, c, m: (
        F.grid_sample(torch.stack([image(m)[0], 2 * m[None]], 1), torch.tanh(a).reshape(1, 2, 3, 2), align_corners=False),
        F.grid_sample(image(C), torch.tanh(a).reshape(1, 2, 3, 2), mode="bicubic", padding_mode="border", align_corners=True),
        F.grid_sample(volume(a), torch.tanh(b).reshape(1, 2, 1, 2, 3), align_corners=False)),
    "affine grids": lambda a, b, c, m: (
        F.affine_grid(a[None, :2, :3], [1, 1, 2, 3], align_corners=False),
        F.affine_grid(a[None], [1, 1, 2, 2, 2], align_corners=True)),
}
