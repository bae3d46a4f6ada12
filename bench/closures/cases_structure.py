"""KANs, radial functions, Fourier operators, graphs; selections and moves of elements."""

import torch
import torch.nn.functional as F

from .corpus import case


def fitted(kind, name, modules, predict, inputs=2, outputs=1, **more):
    """A fit of predict(modules, x) to (m, outputs)."""
    @case(kind, name, **more)
    def make(g):
        made = modules(g)
        made = made if isinstance(made, list) else [made]
        d = g.batch(x=(g.n, inputs), y=(g.n, outputs))
        return g.fit(made, lambda x: predict(*made, x), d)


# Networks of learned functions.

GRID = torch.linspace(-2.2, 2.2, 12, dtype=torch.float64)


def splines(x, order=3):
    """B-spline bases (..., 8) by the recursion of efficient-KAN."""
    x, grid = x[..., None], GRID.to(x.dtype)
    bases = ((x >= grid[:-1]) & (x < grid[1:])).to(x.dtype)
    for k in range(1, order + 1):
        bases = ((x - grid[:-(k + 1)]) / (grid[k:-1] - grid[:-(k + 1)]) * bases[..., :-1]
                 + (grid[k + 1:] - x) / (grid[k + 1:] - grid[1:-k]) * bases[..., 1:])
    return bases


def _kan(p, x):
    for W, V in ((p.W1, p.V1), (p.W2, p.V2)):
        x = F.silu(x) @ V.T + splines(x).flatten(-2) @ W.flatten(1).T
    return x


def _kan_einsum(p, x):
    for W, V in ((p.W1, p.V1), (p.W2, p.V2)):
        x = F.silu(x) @ V.T + torch.einsum("...ik,oik->...o", splines(x), W)
    return x


def _chebyshev(x, degree=4):
    x = torch.tanh(x)
    found = [torch.ones_like(x), x]
    for _ in range(2, degree + 1):
        found.append(2 * x * found[-1] - found[-2])
    return torch.stack(found, -1)


def _chebyshev_kan(p, x):
    for W in (p.A, p.B):
        x = torch.einsum("...ik,oik->...o", _chebyshev(x), W)
    return x


def _chebyshev_by_cos(p, x):
    for W in (p.A, p.B):
        angles = torch.acos(torch.tanh(x).clamp(-1 + 1e-6, 1 - 1e-6))[..., None] * torch.arange(5)
        x = torch.einsum("...ik,oik->...o", torch.cos(angles), W)
    return x


def _fourier_kan(p, x):
    k = torch.arange(1, 4)
    for W, V in ((p.A, p.B), (p.C, p.D)):
        angles = x[..., None] * k
        x = torch.einsum("...ik,oik->...o", torch.cos(angles), W) + torch.einsum("...ik,oik->...o", torch.sin(angles), V)
    return x


_spline_weights = lambda g: g.values(W1=(5, 2, 8), V1=(5, 2), W2=(1, 5, 8), V2=(1, 5))   # noqa: E731
_polynomials = lambda g: g.values(A=(5, 2, 5), B=(1, 5, 5))   # noqa: E731
fitted("learned functions", "efficient-kan", _spline_weights, _kan)
fitted("learned functions", "kan-einsum", _spline_weights, _kan_einsum)
fitted("learned functions", "chebyshev-kan", _polynomials, _chebyshev_kan)
fitted("learned functions", "chebyshev-kan-acos", _polynomials, _chebyshev_by_cos)
fitted("learned functions", "fourier-kan", lambda g: g.values(A=(4, 2, 3), B=(4, 2, 3), C=(1, 4, 3), D=(1, 4, 3)), _fourier_kan)
fitted("learned functions", "rbf-squared-distances", lambda g: g.values(c=(12, 2), s=(12,), w=(12, 1)),
       lambda p, x: torch.exp(-p.s**2 * ((x[..., None, :] - p.c) ** 2).sum(-1)) @ p.w)
fitted("learned functions", "rbf-by-norm", lambda g: g.values(c=(12, 2), s=(12,), w=(12, 1)),
       lambda p, x: torch.exp(-torch.exp(p.s) * (x[..., None, :] - p.c).norm(dim=-1)) @ p.w)
fitted("learned functions", "rbf-by-cdist", lambda g: g.values(c=(12, 2), w=(12, 1)),
       lambda p, x: torch.exp(-torch.cdist(x, p.c)) @ p.w)
fitted("learned functions", "rbf-multiquadric", lambda g: g.values(c=(12, 2), w=(12, 1)),
       lambda p, x: torch.sqrt(1 + ((x[..., None, :] - p.c) ** 2).sum(-1)) @ p.w)
fitted("learned functions", "piecewise-linear", lambda g: g.values(v=(9,)),
       lambda p, x: (lambda t, k: (p.v[k] + (t - k) * (p.v[k + 1] - p.v[k])))(
           (2 * torch.tanh(x[..., :1]) + 4), (2 * torch.tanh(x[..., :1]) + 4).long()))
fitted("learned functions", "product-units", lambda g: g.values(W=(8, 2), v=(8, 1)),
       lambda p, x: torch.prod(1 + 0.3 * torch.tanh(x[..., None, :] * p.W), -1) @ p.v)


# Fourier operators.

def spectral(name, mix):
    @case("fourier operators", name)
    def make(g):
        lift, head = g.net(1, 4), g.net(4, 8, 1)
        p = g.values(real=(4, 4, 3), imaginary=(4, 4, 3), W=(4, 4))
        m = max(g.n // 12, 3)
        d = g.batch(x=(m, 12, 1), y=(m, 12, 1))
        return g.fit([lift, head, p], lambda x: head(torch.tanh(mix(p, lift(x)) + lift(x) @ p.W.T)), d)


def _by_complex(p, h):
    modes = torch.fft.rfft(h, dim=-2)
    mixed = torch.einsum("...ki,iok->...ko", modes[..., :3, :], torch.complex(p.real, p.imaginary))
    return torch.fft.irfft(F.pad(mixed, (0, 0, 0, modes.shape[-2] - 3)), n=12, dim=-2)


def _by_written_modes(p, h):
    modes = torch.fft.rfft(h.transpose(-1, -2))
    weights = torch.view_as_complex(torch.stack([p.real, p.imaginary], -1))
    out = torch.zeros_like(modes)
    out[..., :3] = torch.einsum("...ik,iok->...ok", modes[..., :3], weights)
    return torch.fft.irfft(out, n=12).transpose(-1, -2)


def _by_real_parts(p, h):
    modes = torch.fft.rfft(h, dim=-2)[..., :3, :]
    a, b = modes.real, modes.imag
    real = torch.einsum("...ki,iok->...ko", a, p.real) - torch.einsum("...ki,iok->...ko", b, p.imaginary)
    imaginary = torch.einsum("...ki,iok->...ko", a, p.imaginary) + torch.einsum("...ki,iok->...ko", b, p.real)
    return torch.fft.irfft(torch.complex(real, imaginary), n=12, dim=-2)


spectral("complex-einsum", _by_complex)
spectral("written-modes", _by_written_modes)
spectral("real-parts", _by_real_parts)


@case("fourier operators")
def two_dimensional(g):
    lift, head, p = g.net(1, 3), g.net(3, 1), g.values(a=(3, 3, 2, 2), b=(3, 3, 2, 2))
    m = 2
    d = g.batch(x=(m, 6, 6, 1), y=(m, 6, 6, 1))

    def predict(x):
        modes = torch.fft.rfft2(lift(x).permute(0, 3, 1, 2))
        out = torch.zeros_like(modes)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", modes[:, :, :2, :2], torch.complex(p.a, p.b))
        return head(torch.tanh(torch.fft.irfft2(out, s=(6, 6)).permute(0, 2, 3, 1)))

    return g.residuals([lift, head, p], lambda: predict(d.x) - d.y)


@case("fourier operators")
def power_spectrum(g):
    net, m = g.net(1, 8, 1), 16
    t = torch.linspace(0, 1, m, dtype=g.dtype)[:, None]
    d = g.batch(y=lambda: g.uniform(m // 2 + 1))
    return g.residuals(net, lambda: torch.fft.rfft(net(t)[:, 0]).abs() ** 2 - d.y)


@case("fourier operators")
def spectral_derivative(g):
    p, m = g.values(u=(16,)), 16
    k = 1j * torch.fft.fftfreq(m, 1 / m, dtype=g.dtype)
    d = g.batch(y=(m,))
    return g.residuals(p, lambda: torch.fft.ifft(k * torch.fft.fft(p.u)).real + p.u**2 - d.y)


# Graphs.

def edges(nodes):
    """How many edges a graph has."""
    return 3 * nodes


def graph(name, gather):
    """Two rounds of messages; gather: (messages of nodes (m, 6), ends i and j of the edges) -> sums (m, 6)."""
    @case("graphs", name)
    def make(g):
        message, update, head, m = g.net(4, 6), g.net(10, 4), g.net(4, 2), g.n // 4 + 2
        ends = lambda: g.integers(m, edges(m))   # noqa: E731
        d = g.batch(x=(m, 4), y=(m, 2), i=ends, j=ends)

        def outputs():
            h = d.x
            for _ in range(2):
                found = gather(torch.tanh(message(h)), d.i, d.j)
                h = torch.tanh(update(torch.cat([h, found], 1)))
            return head(h) - d.y

        return g.residuals([message, update, head], outputs)


def _adjacency(m, i, j):
    return torch.sparse_coo_tensor(torch.stack([i, j]), torch.ones(len(i), dtype=m.dtype), (len(m), len(m))).coalesce()


def _columns(i):
    return i[:, None].expand(-1, 6)


def _attention_by_edges(m, i, j):
    scores = torch.exp((m[i] * m[j]).sum(1))
    total = torch.zeros(len(m), dtype=m.dtype).index_add(0, i, scores)
    return torch.zeros_like(m).index_add(0, i, (scores / total[i])[:, None] * m[j])


graph("index-add", lambda m, i, j: torch.zeros_like(m).index_add(0, i, m[j]))
graph("index-add-in-place", lambda m, i, j: torch.zeros_like(m).index_add_(0, i, m[j]))
graph("scatter-add", lambda m, i, j: torch.zeros_like(m).scatter_add(0, _columns(i), m[j]))
graph("scatter-mean", lambda m, i, j: torch.zeros_like(m).scatter_reduce(0, _columns(i), m[j], "mean"))
graph("scatter-max", lambda m, i, j: torch.zeros_like(m).scatter_reduce(0, _columns(i), m[j], "amax"))
graph("sparse-mm", lambda m, i, j: torch.sparse.mm(_adjacency(m, i, j), m))
graph("sparse-matmul", lambda m, i, j: _adjacency(m, i, j) @ m)
graph("dense-adjacency", lambda m, i, j: _adjacency(m, i, j).to_dense() @ m)
graph("index-put-accumulate", lambda m, i, j: torch.zeros_like(m).index_put((i,), m[j], accumulate=True))
graph("attention-by-edges", _attention_by_edges)
graph("index-select", lambda m, i, j: m.index_select(0, i[:len(m)]))


@case("graphs")
def edges_with_features(g):
    net, update, m = g.net(9, 8, 4), g.net(4, 1), g.n // 4 + 2
    ends = lambda: g.integers(m, edges(m))   # noqa: E731
    d = g.batch(x=(m, 4), e=(edges(m), 1), y=(m, 1), i=ends, j=ends)

    def outputs():
        found = net(torch.cat([d.x[d.i], d.x[d.j], d.e], 1))
        return update(torch.zeros(m, 4, dtype=g.dtype).index_add(0, d.j, torch.tanh(found))) - d.y

    return g.residuals([net, update], outputs)


@case("graphs")
def deep_sets(g):
    inner, outer, m = g.net(3, 8, 6), g.net(6, 1), max(g.n // 4, 6)
    d = g.batch(x=(m, 5, 3), y=(m, 1))
    return g.fit([inner, outer], lambda x: outer(inner(x).sum(-2)), d)


@case("graphs")
def point_cloud_max(g):
    inner, outer, m = g.net(3, 8, 6), g.net(6, 1), max(g.n // 4, 6)
    d = g.batch(x=(m, 5, 3), y=(m, 1))
    return g.fit([inner, outer], lambda x: outer(inner(x).amax(-2)), d)


# Selections and moves of elements: f of features h (n, 8).

def moved(name, f):
    @case("selections", name)
    def make(g):
        net, head = g.net(3, 8), g.net(8, 2)
        return g.fit([net, head], lambda x: head(f(torch.tanh(net(x)))), g.batch(x=(g.n, 3), y=(g.n, 2)))


def _column_written(h):
    out = h.clone()
    out[:, 0] = h[:, 1] * h[:, 2]
    return out


def _masked_write(h):
    h = 1.0 * h
    h[h > 0.3] = 0.5
    return h


def _built_by_columns(h):
    out = torch.empty_like(h)
    for k in range(8):
        out[:, k] = h[:, 7 - k] ** 2
    return out


def _slice_added(h):
    out = h + 0
    out[:, :4] += h[:, 4:] ** 2
    return out


moved("flip", lambda h: h * h.flip(1))
moved("flip-rows", lambda h: h.flip(0))
moved("roll", lambda h: h - h.roll(1, 1))
moved("roll-rows", lambda h: h.roll(2, 0))
moved("pad-constant", lambda h: F.pad(h, (1, 1), value=0.3)[:, :8])
moved("pad-reflect", lambda h: F.pad(h[:, None], (2, 1), mode="reflect")[:, 0, :8])
moved("pad-circular", lambda h: F.pad(h[:, None], (2, 1), mode="circular")[:, 0, 1:9])
moved("pad-replicate", lambda h: F.pad(h[:, None], (2, 1), mode="replicate")[:, 0, :8])
moved("sort", lambda h: h.sort(1).values)
moved("topk", lambda h: torch.cat([h.topk(4, 1).values] * 2, 1))
moved("median", lambda h: h - h.median(1, keepdim=True).values)
moved("kthvalue", lambda h: h - h.kthvalue(3, 1, keepdim=True).values)
moved("max-over-features", lambda h: h / (2 + h.max(1, keepdim=True).values))
moved("aminmax", lambda h: (h - h.amin(1, keepdim=True)) / (h.amax(1, keepdim=True) - h.amin(1, keepdim=True) + 1))
moved("cummax", lambda h: h.cummax(1).values)
moved("unfold", lambda h: h.unfold(1, 3, 1).mean(-1).repeat(1, 2)[:, :8])
moved("column-written", _column_written)
moved("masked-write", _masked_write)
moved("built-by-columns", _built_by_columns)
moved("slice-added-in-place", _slice_added)
moved("cat-with-constants", lambda h: torch.cat([h[:, :6], torch.ones_like(h[:, :2])], 1))
moved("stack-of-columns", lambda h: torch.stack([h[:, 2], *h.unbind(1)[:7]], 1))
moved("repeat-interleave", lambda h: h[:, :4].repeat_interleave(2, 1))
moved("tile", lambda h: h[:, :4].tile(1, 2))
moved("take-along-dim", lambda h: torch.take_along_dim(h, h.detach().argsort(1), 1))
moved("gather-by-argmax", lambda h: h * h.gather(1, h.detach().argmax(1, keepdim=True)))
moved("masked-fill", lambda h: h.masked_fill(h.detach() > 0.4, 0.1))
moved("triu", lambda h: (h[:, :, None] * h[:, None]).triu().sum(2))
moved("diagonal", lambda h: (h[:, :, None] * h[:, None]).diagonal(dim1=1, dim2=2))
moved("movedim-permute", lambda h: h.view(-1, 2, 4).movedim(1, 2).reshape(-1, 8))
moved("as-strided", lambda h: h.contiguous().as_strided((len(h), 8), (8, 1)) * 2)
moved("split-and-swap", lambda h: torch.cat(h.split([3, 5], 1)[::-1], 1))
moved("narrow-select", lambda h: h * h.narrow(1, 2, 1) + h.select(1, 0)[:, None])
moved("scatter", lambda h: h.scatter(1, torch.zeros(len(h), 1, dtype=torch.long), h[:, 3:4] ** 2))
moved("index-copy", lambda h: h.index_copy(1, torch.tensor([0, 5]), h[:, 1:3] ** 2))
moved("cumsum", lambda h: h.cumsum(1))
moved("cumsum-over-rows", lambda h: h.cumsum(0) / len(h))
moved("cumprod", lambda h: (1 + 0.3 * h).cumprod(1))
moved("logcumsumexp", lambda h: h.logcumsumexp(1))
moved("diff", lambda h: torch.diff(h, dim=1, prepend=h[:, :1] * 0))
moved("rot90", lambda h: h.view(-1, 2, 4).rot90(1, (1, 2)).reshape(-1, 8))
moved("outer-flattened", lambda h: torch.einsum("bi,bj->bij", h[:, :2], h[:, 2:6]).flatten(1))
moved("batch-centred", lambda h: h - h.mean(0))
moved("searchsorted-weights", lambda h: h * torch.bucketize(h.detach(), torch.tensor([-0.5, 0.0, 0.5], dtype=h.dtype)))
