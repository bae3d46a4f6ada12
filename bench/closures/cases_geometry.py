"""Geometry and linear algebra in closures."""

import torch
import torch.nn.functional as F

from .corpus import case


def posed(name, start, model, kind="geometry"):
    """A fit of points: model(p, x (n, 3)) against y (n, 3)."""
    @case(kind, name)
    def make(g):
        p = g.values(**start)
        d = g.batch(x=(g.n // 3 + 2, 3), y=(g.n // 3 + 2, 3))
        return g.fit(p, lambda x: model(p, x), d)


def _rotate(q, x):
    """Points turned by a unit quaternion, by two cross products."""
    w, v = q[0], q[1:].expand_as(x)
    t = 2 * torch.linalg.cross(v, x)
    return x + w * t + torch.linalg.cross(v, t)


def _rotate_by_matrix(q, x):
    w, a, b, c = q.unbind()
    R = torch.stack([
        torch.stack([1 - 2 * (b * b + c * c), 2 * (a * b - c * w), 2 * (a * c + b * w)]),
        torch.stack([2 * (a * b + c * w), 1 - 2 * (a * a + c * c), 2 * (b * c - a * w)]),
        torch.stack([2 * (a * c - b * w), 2 * (b * c + a * w), 1 - 2 * (a * a + b * b)]),
    ])
    return x @ R.T


def _skew(w):
    o = torch.zeros((), dtype=w.dtype)
    return torch.stack([o, -w[2], w[1], w[2], o, -w[0], -w[1], w[0], o]).view(3, 3)


def _rodrigues(w, x):
    angle = w.norm()
    axis = (w / angle).expand_as(x)
    c = torch.cos(angle)
    return x * c + torch.cross(axis, x, dim=-1) * torch.sin(angle) + axis * (axis * x).sum(-1, keepdim=True) * (1 - c)


def _six_dimensional(a, x):
    first = F.normalize(a[0], dim=0)
    second = F.normalize(a[1] - (first * a[1]).sum() * first, dim=0)
    return x @ torch.stack([first, second, torch.linalg.cross(first, second)])


def _euler(e, x):
    (ca, cb, cc), (sa, sb, sc) = torch.cos(e), torch.sin(e)
    R = torch.stack([cb * cc, -cb * sc, sb, ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb,
                     sa * sc - ca * sb * cc, sa * cc + ca * sb * sc, ca * cb]).view(3, 3)
    return x @ R.T


QUATERNION = {"q": [0.9, 0.2, -0.3, 0.1], "t": [0.1, 0.2, -0.1]}
VECTOR = {"w": [0.3, -0.4, 0.2], "t": [0.1, 0.2, -0.1]}
posed("quaternion-normalized", QUATERNION, lambda p, x: _rotate(p.q / p.q.norm(), x) + p.t)
posed("quaternion-f-normalize", QUATERNION, lambda p, x: _rotate(F.normalize(p.q, dim=0), x) + p.t)
posed("quaternion-matrix", QUATERNION, lambda p, x: _rotate_by_matrix(p.q / torch.linalg.norm(p.q), x) + p.t)
posed("rodrigues", VECTOR, lambda p, x: _rodrigues(p.w, x) + p.t)
posed("matrix-exp", VECTOR, lambda p, x: x @ torch.linalg.matrix_exp(_skew(p.w)).T + p.t)
posed("six-dimensional", {"a": [[1.0, 0.2, 0.1], [-0.1, 0.9, 0.3]], "t": [0.1, 0.2, -0.1]},
      lambda p, x: _six_dimensional(p.a, x) + p.t)
posed("euler-angles", {"e": [0.3, -0.4, 0.2], "t": [0.1, 0.2, -0.1]}, lambda p, x: _euler(p.e, x) + p.t)
posed("similarity", QUATERNION | {"s": 0.1}, lambda p, x: torch.exp(p.s) * _rotate(p.q / p.q.norm(), x) + p.t)
posed("procrustes-svd", {"A": [[1.0, 0.2, 0.1], [-0.1, 0.9, 0.3], [0.2, 0.1, 1.2]]},
      lambda p, x: x @ (lambda u, s, v: u @ v)(*torch.linalg.svd(p.A)))


@case("geometry")
def a_quaternion_per_sample(g):
    net, m = g.net(3, 10, 4), g.n // 3 + 2
    d = g.batch(x=(m, 3), v=(m, 3), y=(m, 3))

    def outputs():
        q = net(d.x) + torch.tensor([1.0, 0, 0, 0], dtype=g.dtype)
        q = q / q.norm(dim=1, keepdim=True)
        w, u = q[:, :1], q[:, 1:]
        t = 2 * torch.cross(u, d.v, dim=1)
        return d.v + w * t + torch.cross(u, t, dim=1) - d.y

    return g.residuals(net, outputs)


@case("geometry")
def se2_pose_graph(g):
    p, m = g.values(x=(8, 3)), max(g.n // 8, 12)
    d = g.batch(i=lambda: g.integers(8, m), j=lambda: g.integers(8, m), z=lambda: g.randn(m, 3, scale=0.3))

    def outputs():
        a, b = p.x[d.i], p.x[d.j]
        c, s = torch.cos(a[:, 2]), torch.sin(a[:, 2])
        dx, dy = (b - a)[:, 0], (b - a)[:, 1]
        angle = b[:, 2] - a[:, 2] - d.z[:, 2]
        return torch.stack([c * dx + s * dy - d.z[:, 0], c * dy - s * dx - d.z[:, 1],
                            torch.atan2(torch.sin(angle), torch.cos(angle))], 1), p.x[0]

    return g.residuals(p, outputs)


@case("geometry")
def bundle_adjustment(g):
    p, m = g.values(w=(3, 3), t=(3, 3), X=(10, 3), f=1.1), max(g.n // 4, 20)
    d = g.batch(i=lambda: g.integers(3, m), j=lambda: g.integers(10, m), z=(m, 2))

    def outputs():
        w, X = p.w[d.i], p.X[d.j]
        angle = (w * w).sum(1, keepdim=True).sqrt()
        axis = w / angle
        Y = (X * torch.cos(angle) + torch.linalg.cross(axis, X) * torch.sin(angle)
             + axis * (axis * X).sum(1, keepdim=True) * (1 - torch.cos(angle))) + p.t[d.i]
        Y = Y + torch.tensor([0.0, 0.0, 6.0], dtype=g.dtype)
        return p.f * Y[:, :2] / Y[:, 2:] - d.z

    return g.residuals(p, outputs)


@case("geometry")
def bearings(g):
    p = g.values(x=[0.3, -0.2])
    d = g.batch(a=(g.n, 2), y=lambda: g.uniform(g.n, low=-1))

    def outputs():
        r = d.a - p.x
        gap = torch.atan2(r[:, 1], r[:, 0]) - d.y
        return torch.remainder(gap + torch.pi, 2 * torch.pi) - torch.pi

    return g.residuals(p, outputs)


@case("geometry")
def robot_arm(g):
    net, m = g.net(2, 10, 3), g.n // 2 + 2
    d = g.batch(x=(m, 2))

    def outputs():
        angles = net(d.x).cumsum(1)
        return torch.stack([torch.cos(angles).sum(1), torch.sin(angles).sum(1)], 1) - d.x

    return g.residuals(net, outputs)


@case("geometry")
def spherical_coordinates(g):
    net = g.net(3, 10, 2)
    d = g.batch(x=(g.n // 3 + 2, 3), y=(g.n // 3 + 2, 3))

    def predict(x):
        a, b = net(x).unbind(-1)
        return torch.stack([torch.sin(a) * torch.cos(b), torch.sin(a) * torch.sin(b), torch.cos(a)], -1)

    return g.fit(net, predict, d)


@case("geometry")
def angles_between_vectors(g):
    net = g.net(3, 10, 3)
    d = g.batch(x=(g.n, 3), y=lambda: g.uniform(g.n, 1))
    return g.fit(net, lambda x: torch.acos(0.99 * F.cosine_similarity(net(x), x, dim=-1))[..., None], d)


@case("geometry")
def poincare_distances(g):
    p, m = g.values(x=(10, 2)), 30
    d = g.batch(i=lambda: g.integers(5, m), j=lambda: 5 + g.integers(5, m), y=lambda: g.uniform(m))

    def outputs():
        x = 0.9 * torch.tanh(p.x) / 1.5
        a, b = x[d.i], x[d.j]
        gap = (a - b).square().sum(1) / ((1 - a.square().sum(1)) * (1 - b.square().sum(1)))
        return torch.acosh(1 + 1e-6 + 2 * gap) - d.y

    return g.residuals(p, outputs)


@case("geometry")
def elastic_springs(g):
    p = g.values(x=(9, 3))
    i, j = torch.triu_indices(9, 9, 1)
    d = g.batch(rest=lambda: g.uniform(36, low=0.5))
    return g.residuals(p, lambda: torch.linalg.vector_norm(p.x[i] - p.x[j], dim=1) - d.rest)


# Linear algebra: a (4, 4) matrix per sample from a network, or one from parameters.

def matrices(name, f, k=4):
    """f of well-conditioned matrices A (m, 4, 4) and vectors b (m, 4)."""
    @case("linear algebra", name)
    def make(g):
        net, m = g.net(3, 8, 16), max(g.n // 8, 5)
        d = g.batch(x=(m, 3), b=(m, 4), y=(m, k))
        eye = torch.eye(4, dtype=g.dtype)
        return g.residuals(net, lambda: f(3 * eye + 0.5 * net(d.x).view(-1, 4, 4), d.b).reshape(m, -1)[:, :k] - d.y)


matrices("solve", lambda A, b: torch.linalg.solve(A, b))
matrices("inverse", lambda A, b: (torch.linalg.inv(A) @ b[..., None])[..., 0])
matrices("torch-inverse", lambda A, b: torch.inverse(A))
matrices("cholesky", lambda A, b: torch.linalg.cholesky(A @ A.mT + torch.eye(4, dtype=A.dtype)))
matrices("cholesky-solve", lambda A, b: torch.cholesky_solve(b[..., None], torch.linalg.cholesky(A @ A.mT)))
matrices("triangular-solve", lambda A, b: torch.linalg.solve_triangular(A.triu(), b[..., None], upper=True))
matrices("determinant", lambda A, b: torch.linalg.det(A)[:, None], 1)
matrices("log-determinant", lambda A, b: torch.logdet(A @ A.mT)[:, None], 1)
matrices("slogdet", lambda A, b: torch.linalg.slogdet(A).logabsdet[:, None], 1)
matrices("eigenvalues-symmetric", lambda A, b: torch.linalg.eigvalsh(A + A.mT + torch.diag(torch.arange(4.0, dtype=A.dtype))))
matrices("eigenvectors-symmetric", lambda A, b: (lambda w, V: ((V * torch.tanh(w)[:, None]) @ V.mT))(
    *torch.linalg.eigh(A + A.mT + torch.diag(torch.arange(4.0, dtype=A.dtype)))))
matrices("singular-values", lambda A, b: torch.linalg.svdvals(A + torch.diag(torch.arange(4.0, dtype=A.dtype))))
matrices("qr", lambda A, b: torch.linalg.qr(A).R)
matrices("matrix-power", lambda A, b: torch.linalg.matrix_power(0.3 * A, 3))
matrices("matrix-exp", lambda A, b: torch.linalg.matrix_exp(0.2 * A))
matrices("trace", lambda A, b: A.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) ** 2, 1)
matrices("pinv", lambda A, b: (torch.linalg.pinv(A[:, :, :3]) @ b[..., None])[..., 0], 3)
matrices("matrix-norm", lambda A, b: torch.linalg.matrix_norm(A)[:, None], 1)
matrices("einsum-chain", lambda A, b: torch.einsum("bij,bjk,bk->bi", A, A, b))
matrices("kalman-update", lambda A, b: (lambda S: (A @ torch.linalg.solve(S, b[..., None]))[..., 0])(
    A @ A.mT + torch.eye(4, dtype=A.dtype)))


@case("linear algebra")
def gaussian_process_mean(g):
    p, m = g.values(length=0.2, noise=-1.0, scale=0.1), 20
    d = g.batch(x=(m, 2), y=(m,))

    def outputs():
        K = torch.exp(p.scale - (d.x[:, None] - d.x).square().sum(-1) * torch.exp(-p.length))
        return K @ torch.linalg.solve(K + torch.exp(p.noise) * torch.eye(m, dtype=g.dtype), d.y) - d.y

    return g.residuals(p, outputs)


@case("linear algebra")
def implicit_layer_by_solve(g):
    p = g.values(W=(4, 4), U=(4, 3))
    d = g.batch(x=(g.n // 4 + 2, 3), y=(g.n // 4 + 2, 4))
    eye = torch.eye(4, dtype=g.dtype)
    return g.residuals(p, lambda: torch.linalg.solve(2 * eye + p.W, (d.x @ p.U.T).T).T - d.y)


@case("linear algebra")
def least_squares_layer(g):
    net, m = g.net(1, 8, 3), g.n
    d = g.batch(x=(m, 1), y=(m, 1))

    def outputs():
        B = torch.tanh(net(d.x))
        return B @ torch.linalg.solve(B.T @ B + 0.1 * torch.eye(3, dtype=g.dtype), B.T @ d.y) - d.y   # variable projection

    return g.residuals(net, outputs)
