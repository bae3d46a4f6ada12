"""Each Triton kernel alone against the formula of its docstring in plain PyTorch, on awkward sizes.

Runs where there is a GPU, and under Triton's interpreter, which test_triton.py starts.
"""

import os

import pytest
import torch
from helpers import rand, relative
from hypothesis import given, settings
from hypothesis import strategies as st

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("there is no GPU; test_triton.py runs these tests under the interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from pgdfast.kernels import cg_rules  # noqa: E402
from pgdfast.kernels.cg_rules import CHECK, ENDED, ITERATE, MAX_ITERATIONS, RESTORE, SOLVED, STAGNATED  # noqa: E402
from pgdfast.kernels.triton_kernels import cg, epilogue, gather, muladd, project  # noqa: E402
from pgdfast.kernels.triton_kernels.gram import TILE, gram  # noqa: E402
from pgdfast.kernels.triton_kernels.launch import Space  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter of Triton 3.6 takes scalars from arrays of one element, of which numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DTYPES = {"f32": torch.float32, "f64": torch.float64}
BOUND = {torch.float32: 2e-6, torch.float64: 1e-14}
both = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
quick = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def draw(*shape, seed=0, dtype):
    return rand(*shape, seed=seed, dtype=dtype).to(DEVICE)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


@both
@pytest.mark.parametrize("size", [1, muladd.BLOCK - 1, muladd.BLOCK, muladd.BLOCK + 1, 2503])
@pytest.mark.parametrize("overwrite", [False, True])
def test_muladd_of_one_piece(size, overwrite, dtype):
    x, c, y = (draw(3, size, seed=k, dtype=dtype) for k in range(3))
    space = Space([size], [1], [1], [1])
    expected = (0 if overwrite else y) + (1 / 3) * c[0] * x
    muladd.muladd(y, x, c[0], numbers(1 / 3), space, overwrite)
    assert relative(y, expected) < BOUND[dtype]


@quick
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    stretched=st.integers(0, 63),
    constant=st.booleans(),
)
def test_muladd_of_any_strides(shape, order, stretched, constant):
    """Axes in any order and steps, operands repeated, and targets that repeat, which sum."""
    def strides(repeats):
        found, reach = [0] * len(shape), 1
        for d in order.sample(range(len(shape)), len(shape)):
            if not repeats >> d & 1:
                found[d] = reach
                reach *= shape[d] + 1
        return found, reach

    (ys, y_size), (xs, x_size), (cs, c_size) = strides(stretched), strides(stretched >> 2 & 5), strides(stretched >> 1 & 3)
    y, x, c = (draw(2, n, seed=n, dtype=torch.float64) for n in (y_size, x_size, c_size))
    value = 0.7 * x.as_strided((2, *shape), (x_size, *xs))
    value = value * c[0].as_strided(shape, cs) if constant else value
    expected = y.clone()
    summed = [d for d, s in enumerate(ys) if s == 0 and shape[d] > 1]
    kept = [1 if d in summed else n for d, n in enumerate(shape)]
    expected.as_strided((2, *kept), (y_size, *ys)).add_(value.sum([d + 1 for d in summed], keepdim=True) if summed else value)
    muladd.muladd(y, x, c[0] if constant else None, numbers(0.7), Space(shape, ys, xs, cs))
    assert relative(y, expected) < 1e-14


@both
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 33), (127, 31), (129, 33), (509, 1), (509, 5)])
def test_muladd_that_sums_long_columns(rows, columns, dtype):
    """A bias's gradient: partial sums in a fixed order."""
    x, y = draw(2, rows * columns, dtype=dtype), draw(2, columns, seed=1, dtype=dtype)
    expected, again = y + x.view(2, rows, columns).sum(1), y.clone()
    space = Space([rows, columns], [0, 1], [columns, 1], [0, 0])
    muladd.muladd(y, x, None, numbers(1.0), space)
    muladd.muladd(again, x, None, numbers(1.0), space)
    assert relative(y, expected) < 4 * BOUND[dtype] and torch.equal(y, again)


@both
@pytest.mark.parametrize("rows, columns", [(1, 1), (63, 31), (64, 32), (65, 33), (257, 5)])
@pytest.mark.parametrize("constant", ["tensor", "number", None])
def test_epilogue(rows, columns, constant, dtype):
    size, alpha, beta = rows * columns, 0.6, -1.3
    y, z = draw(2, size, dtype=dtype), draw(2, size, seed=1, dtype=dtype)
    b = draw(2, columns, seed=2, dtype=dtype)
    c = {"tensor": draw(size, seed=3, dtype=dtype), "number": draw(1, seed=3, dtype=dtype), None: None}[constant]
    factor = 1 if c is None else c
    middle = y + alpha * b.repeat(1, rows)
    image, kept, lone = z.clone(), y.clone(), y.clone()
    epilogue.forward(image, kept, b, c, numbers(alpha, beta), rows, columns, True, False)
    assert relative(image, z + beta * factor * middle) < BOUND[dtype] and relative(kept, middle) < BOUND[dtype]
    epilogue.forward(image.fill_(torch.nan), lone, b, c, numbers(alpha, beta), rows, columns, False, True)
    assert relative(image, beta * factor * middle) < BOUND[dtype] and torch.equal(lone, y)

    for overwrite in (False, True):
        back, bias = y.clone(), b.clone()
        expected = (0 if overwrite else y) + beta * factor * z
        if overwrite:
            back.fill_(torch.nan)
        epilogue.adjoint(back, bias, z, c, numbers(alpha, beta), rows, columns, overwrite)
        assert relative(back, expected) < BOUND[dtype]
        assert relative(bias, b + alpha * expected.view(2, rows, columns).sum(1)) < 4 * BOUND[dtype]


@both
@pytest.mark.parametrize("rows, width, count", [(1, 1, 1), (5, 3, 2), (40, 129, 3), (1100, 1, 7), (3, 8, 11)])
def test_gather(rows, width, count, dtype):
    generator = torch.Generator().manual_seed(rows)
    positions = torch.randint(-1, count, (rows,), generator=generator).to(DEVICE)
    x, y = draw(2, count * (width + 2), dtype=dtype), draw(2, rows * (width + 1), seed=1, dtype=dtype)
    x_rows, y_rows = x.view(2, count, width + 2)[..., :width], y.view(2, rows, width + 1)[..., :width]
    taken = x_rows[:, positions.clamp_min(0)] * (positions >= 0)[:, None].to(dtype)
    for overwrite in (False, True):
        image = y.clone()
        expected = image.clone().view(2, rows, -1)
        expected[..., :width] = (0 if overwrite else y_rows) + 0.4 * taken
        gather.forward(image, x, positions, numbers(0.4), rows, width, width + 1, width + 2, overwrite)
        assert relative(image.view(2, rows, -1), expected) < BOUND[dtype]
    back, expected = x.clone(), x.clone()
    for i, p in enumerate(positions.tolist()):
        if p >= 0:
            expected.view(2, count, -1)[:, p, :width] += 0.4 * y_rows[:, i]
    gather.adjoint(back, y, *gather.sorted_positions(positions, count), numbers(0.4), width, width + 1, width + 2)
    assert relative(back, expected) < 4 * BOUND[dtype]


@both
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (9, 64), (2, 1023), (2, 1025), (2, 3, 2, 2, 17)])
@pytest.mark.parametrize("terms", [1, 2])
def test_project(shape, terms, dtype):
    rows, n = torch.Size(shape[:-1]).numel(), shape[-1]

    def strides(step=1, row=None):
        row = n * step if row is None else row
        found = [step]
        for size in reversed(shape[1:-1]):
            found.insert(0, row)
            row *= size
        return [row, *found]

    x, y = draw(2, rows * n * 2, dtype=dtype), draw(2, rows * n, seed=1, dtype=dtype)
    post, left, right = (draw(rows * n, seed=k, dtype=dtype) for k in (2, 3, 4))
    row = draw(n, seed=5, dtype=dtype)
    at = strides()
    pre_at = [0] * (len(shape) - 1) + [1]   # one row for all
    X = x.as_strided((2, *shape), (x.stride(0), *strides(2))) * row
    L, R = left.view(shape), right.view(shape)
    expected = X - 0.3 * L * (R * X).sum(-1, keepdim=True)
    expected = expected - (0.3 * X.sum(-1, keepdim=True) if terms == 2 else 0)
    expected = y.view(2, *shape) + post.view(shape) * expected
    space = project.Rows(list(shape), [at, strides(2), pre_at, at, at, at, [0] * len(shape), [0] * len(shape)])
    project.project(y, x, [row, post, left, right, None, None], numbers(0.3), space, terms)
    assert relative(y.view(2, *shape), expected) < 8 * BOUND[dtype]


def sizes_around(tile):
    return (1, tile - 1, tile, tile + 1, 3 * tile - 7)


@both
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("depths", [(1, 1), (15, 17), (40, 3)])
def test_gram_tile_of_one_use(which, depths, dtype):
    M = sizes_around(TILE[dtype.itemsize])[which]
    A, B = draw(M, depths[0], dtype=dtype), draw(M, depths[1], seed=1, dtype=dtype)
    K = draw(M, M, seed=2, dtype=dtype)
    expected = K + (A @ A.T) * (0.5 * (B @ B.T) + 0.25)
    gram(K, A, B, None, torch.tensor([[0, M, 0]], device=DEVICE), numbers(0.5, 0.25), 1)
    assert relative(K.triu(), expected.triu()) < BOUND[dtype]


@both
@pytest.mark.parametrize("shared", [False, True])
def test_gram_of_several_uses(shared, dtype):
    """Uses that reach different residuals, three of a row in the shared form: sums over all pairs stay in one tile."""
    M = 3 * (TILE[dtype.itemsize] // 2 + 5)
    spans = [(0, M), (0, M - 9), (3 * (M // 6), M)]
    parts = [(draw(b - a, 6, seed=a + b, dtype=dtype), draw((b - a) // 3, 4, seed=b - a, dtype=dtype)) for a, b in spans]
    full_A = [torch.zeros(M, 6, dtype=dtype, device=DEVICE) for _ in spans]
    full_B = [torch.zeros(M, 4, dtype=dtype, device=DEVICE) for _ in spans]
    for (a, b), (A, B), fA, fB in zip(spans, parts, full_A, full_B, strict=True):
        fA[a:b], fB[a:b] = A, B.repeat_interleave(3, 0)
    expected = sum(
        (p @ q.T) * ((f @ g.T) + 1.0) for p, f in zip(full_A, full_B, strict=True) for q, g in zip(full_A, full_B, strict=True)
    )
    starts = [0, M, M + M - 9]
    ranges = torch.tensor([(a, b, s) for (a, b), s in zip(spans, starts, strict=True)], device=DEVICE)
    A, B = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    owner = torch.arange(len(A), device=DEVICE) // 3
    K = torch.zeros(M, M, dtype=dtype, device=DEVICE)
    gram(K, A, B @ B.T if shared else B[owner], owner if shared else None, ranges, numbers(1.0, 1.0), 3)
    assert relative(K.triu(), expected.triu()) < BOUND[dtype]
    again = torch.zeros_like(K)
    gram(again, A, B @ B.T if shared else B[owner], owner if shared else None, ranges, numbers(1.0, 1.0), 3)
    assert torch.equal(K, again)


@both
@pytest.mark.parametrize("size", [1, cg.BLOCK + 1, 5003])
@pytest.mark.parametrize("path", [False, True])
def test_one_iteration_of_cg(size, path, dtype):
    w, Aw, d, b, r, m, x = (draw(size, seed=k, dtype=dtype) for k in range(7))
    d, m, Aw = d.abs(), m.abs(), Aw + 3 * w   # a positive curvature
    passes = cg.Passes(w)
    product = Aw + d * w
    passes.dots(Aw, w, d, b)
    assert relative(Aw, product) < BOUND[dtype]
    curvature = float(w.double() @ Aw.double())
    assert abs(float(passes.first[0, : passes.programs].sum()) - curvature) < 1e-12 * curvature
    state = torch.zeros(cg.SIZE, dtype=torch.float64, device=DEVICE)
    z = m * r
    rz = float(z.double() @ r.double())
    state[cg.RZ], state[cg.PHASE], state[cg.TARGET] = rz, ITERATE, 1e-9
    step = rz / curvature
    x_new, r_new = x + step * w, r - step * Aw
    passes.update(x, r, w, Aw, b, m, state, path)
    assert relative(x, x_new) < 2 * BOUND[dtype] and relative(r, r_new) < 2 * BOUND[dtype]
    values, new = torch.zeros(20, dtype=torch.float64, device=DEVICE), torch.empty_like(state)
    p, safe = w.clone(), torch.zeros_like(x)
    slots = torch.zeros(4, size, dtype=dtype, device=DEVICE) if path else None
    kept = torch.zeros(4, 4, dtype=torch.float64, device=DEVICE) if path else None
    following = float((m * r).double() @ r.double())
    direction = m * r + (following / rz) * p
    passes.turn(p, w, x, r, None, m, safe, state, new, values, slots, kept, 10, numbers(0.0))
    assert relative(p, direction) < 4 * BOUND[dtype] and torch.equal(p, w)
    assert int(new[cg.ITERATIONS]) == 1 and int(new[cg.PHASE]) == ITERATE
    assert abs(float(new[cg.RZ]) - following) < 4 * BOUND[dtype] * following
    assert abs(float(values[1]) - 0.5 * step * rz) < 1e-6 * step * rz
    if path:
        assert torch.equal(slots[0], x) and float(kept[0, 0]) == 1
        assert abs(float(kept[0, 2]) - float(x.double() @ x.double())) < 1e-9 * float(kept[0, 2])


@pytest.mark.parametrize("safe_value, target, last_claim, limit, phase, status", [
    (0.0, 1e9, 1e9, 10, ENDED, SOLVED),             # the true residual has arrived
    (0.0, 0.0, 1e9, 10, ITERATE, MAX_ITERATIONS),   # it has not: start anew from it
    (0.0, 0.0, 1e-9, 10, ENDED, STAGNATED),         # again not, and no better than at the last claim
    (1e9, 0.0, 1e9, 10, RESTORE, MAX_ITERATIONS),   # the model's value has fallen since the last check
    (0.0, 0.0, 1e9, 7, ENDED, MAX_ITERATIONS),
])
def test_a_check_of_cg(safe_value, target, last_claim, limit, phase, status):
    size = 1501
    x, Aw, d, b, r, p, safe = (draw(size, seed=k, dtype=torch.float64) for k in range(7))
    d = d.abs()
    Aw, point = Aw + x, x.clone()
    product = Aw + d * x
    b += product   # the model's value is positive
    passes, state = cg.Passes(x), torch.zeros(cg.SIZE, dtype=torch.float64, device=DEVICE)
    w, earlier = x.clone(), safe.clone()
    for place, value in [
        (cg.STATUS, MAX_ITERATIONS), (cg.PHASE, CHECK), (cg.CLAIMED, 1), (cg.ITERATIONS, 7), (cg.RZ, 3), (cg.BEFORE, 2),
        (cg.VALUE, 1), (cg.RECURRENCE, 1e-3), (cg.SAFE, safe_value), (cg.TARGET, target), (cg.LAST_CLAIM, last_claim),
    ]:
        state[place] = value
    new, values = torch.empty_like(state), torch.zeros(20, dtype=torch.float64, device=DEVICE)
    passes.dots(Aw, w, d, b)
    passes.update(x, r, p, Aw, b, None, state, False)
    assert relative(r, b - product) < 1e-14 and torch.equal(x, point)
    passes.turn(p, w, x, r, None, None, safe, state, new, values, None, None, limit, numbers(0.0))
    assert (int(new[cg.STATUS]), int(new[cg.PHASE]), int(new[cg.ITERATIONS])) == (status, phase, 7)
    assert abs(float(new[cg.NORM]) - float(r.norm())) < 1e-12 * float(r.norm())
    assert torch.equal(x, earlier if phase == RESTORE else point) and torch.equal(safe, earlier)
    if phase == ITERATE:
        assert torch.equal(p, r) and torch.equal(w, p) and float(new[cg.LAST_CLAIM]) == float(new[cg.NORM])
    # A solve that has ended stays as it is.
    if phase == ENDED:
        before = [t.clone() for t in (x, r, p, safe)]
        passes.dots(Aw, w, d, b)
        passes.update(x, r, p, Aw, b, None, new, False)
        passes.turn(p, w, x, r, None, None, safe, new, state, values, None, None, limit, numbers(0.0))
        assert all(torch.equal(a, t) for a, t in zip(before, (x, r, p, safe), strict=True))
        assert int(state[cg.STATUS]) == status and float(state[cg.NORM]) == float(new[cg.NORM])


def test_the_rules_are_those_of_python():
    """Random states through the kernel's `turn`, and through the same rules on the host."""
    random, host = torch.Generator().manual_seed(0), cg_rules.rules_with(cg_rules.where)
    met = set()
    for trial in range(70):
        draws = torch.rand(20, generator=random, dtype=torch.float64).tolist()
        phase = (ITERATE, CHECK, RESTORE, ENDED)[int(4 * draws[0])]
        iteration = (0, 1, 7, 49, 50, 120)[int(6 * draws[1])] if phase == ITERATE else (1, 7, 50, 120)[int(4 * draws[1])]
        rz, target = (draws[2] - 0.1, 0.0, -1.0)[int(2.2 * draws[3])], 10.0 ** (4 * draws[4] - 2)
        value, recurrence, last_claim, safe = draws[5], 2 * draws[6], 4 * draws[7], draws[8]
        claimed, before, progress = draws[9] < 0.5, draws[10], 0.02 * (draws[11] < 0.5)
        x, Aw, d, b, r, p, kept = (draw(33, seed=100 * trial + k, dtype=torch.float64) for k in range(7))
        w, passes = (p if phase == ITERATE else x).clone(), cg.Passes(x)
        Aw = Aw * 0.1 + (w if draws[12] < 0.9 else -w)
        state, new = numbers(
            rz, 1.0, target, value, iteration, MAX_ITERATIONS, phase, recurrence, last_claim, safe, claimed, before,
        ), torch.zeros(cg.SIZE, dtype=torch.float64, device=DEVICE)
        values = torch.linspace(0, 1, 160, dtype=torch.float64, device=DEVICE)
        passes.dots(Aw, w, 0 * d, b)
        step, broken = host.step_length(phase, float(w @ Aw), rz)
        reached = float(b @ w) - 0.5 * float(w @ Aw)
        passes.update(x, r, p, Aw, b, None, state, False)
        norm = float(r.norm())
        passes.turn(p, w, x, r, None, None, kept, state, new, values, None, None, 121, numbers(progress))
        found = host.judge(
            phase, MAX_ITERATIONS, iteration, claimed, broken, step, rz if phase == ITERATE else before, norm, target, value,
            recurrence, last_claim, safe, reached,
        )
        window = host.progress_window(found[2])
        after, status = host.go_on(
            found[0], found[1], found[-1], found[2], window, found[4], float(values[max(found[2] - window, 0)]), progress, 121
        )
        told = [float(new[k]) for k in (cg.PHASE, cg.STATUS, cg.ITERATIONS, cg.CLAIMED)]
        assert told == [after, status, found[2], found[3]]
        close = [float(new[k]) for k in (cg.VALUE, cg.RECURRENCE, cg.LAST_CLAIM, cg.SAFE)]
        assert close == pytest.approx(list(found[4:8]), rel=1e-12)
        met.add((phase, after, status))
    assert len(met) >= 8, met
