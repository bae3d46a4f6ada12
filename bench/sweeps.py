"""Families of tanh networks that differ in one size, and how cost grows with it."""

import math

from . import parts
from .interleave import Row, interleaved
from .measure import product_rows, step_rows, vector
from .peers import LM, Adam, TorchFunc
from .peers_jax import Jax, JaxProduct
from .problems import Regression
from .products import CompiledCurvlinops, TorchFuncProduct
from .tables import Measured

DAMPING = 1.0   # keeps all sizes within float32's reach: one kind of arithmetic throughout
SHARE = 1 / 3   # of the operations: where the Cholesky has less, the Gram matrix, quadratic in N, decides


def _network(*widths):
    return lambda samples, name: Regression(name, f"tanh {'-'.join(map(str, widths))}", widths, samples, DAMPING)


def sweeps(quick=False):
    """{sweep: (what stays, {size: problem})}."""
    widths = (32, 64, 128, 256, 512, 1024) if quick else (32, 64, 128, 256, 512, 1024, 2048)
    depths = (1, 2, 4, 8, 16)
    rows = (50, 100, 200, 400, 800, 1600) if quick else (50, 100, 200, 400, 800, 1200, 1600, 2400, 3200)
    return {
        "width": ("tanh 8-w-w-1, 128 rows", {w: _network(8, w, w, 1)(128, f"width {w}") for w in widths}),
        "depth": ("tanh 8-64-...-64-1, 128 rows", {d: _network(8, *[64] * d, 1)(128, f"depth {d}") for d in depths}),
        "rows": ("tanh 2-256-256-1, N rows", {n: _network(2, 256, 256, 1)(n, f"N = {n}") for n in rows}),
    }


BUDGET = 0.4   # seconds for all rounds of a row
COMPILED = (256, 1024)   # widths for which curvlinops is compiled, half a minute in all


def measure(sweep, size, rounds, quick=False):
    """All rows of one size, as Measured."""
    what, points = sweeps(quick)[sweep]
    problem = points[size]
    # The largest sizes at which a peer is timed.
    limits = {("width", TorchFunc): 256, ("width", Jax): 256, ("rows", TorchFunc): 400 if quick else 800, ("rows", Jax): 400,
              ("width", TorchFuncProduct): 4096, ("width", JaxProduct): 4096}
    steps = [LM, Adam, *(kind for kind in (TorchFunc, Jax) if size <= limits.get((sweep, kind), 0))]
    products = [kind for kind in (TorchFuncProduct, JaxProduct) if size <= limits.get((sweep, kind), 0)]
    if sweep == "width" and size in COMPILED:
        products.append(CompiledCurvlinops)
    rows, missing, _ = step_rows(problem, steps)
    more, absent, _ = product_rows(problem, products)
    lin, v = parts.linearized(problem, problem.model()), vector(problem)
    own = [Row(parts.GGN, lambda: lin.ggn(v), flops=2 * problem.sweep_flops)]
    floors = [row for row in parts.floors(problem) if row.name in (parts.CHOLESKY, parts.GEMMS)]
    timings = interleaved(rows + own + more + floors, rounds, BUDGET)
    return Measured(f"{sweep} {size}", timings, missing | absent,
                    products=(*(kind.name for kind in products), parts.GGN, parts.GEMMS),
                    facts={"network": what, "residuals": problem.residuals, "parameters": problem.parameters,
                           "cholesky_share": problem.cholesky_flops / problem.step_flops})


def slope(sizes, seconds):
    """The exponent k of seconds = c size^k by least squares in logarithms; needs two different sizes."""
    if len(set(sizes)) < 2:
        raise ValueError(f"slope: got sizes {list(sizes)}; needed: two different ones at least.")
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def upper_half(sizes):
    """The larger half of sizes in order, two at least."""
    return sizes[-max(2, (len(sizes) + 1) // 2):]


def slopes(sweep, points, row):
    """{what: (exponent, sizes)} of a row's time in a sweep's {size: Measured}, each over the upper half of its range.

    width: over the number of parameters. rows: over N, apart where the Cholesky has less than SHARE of the operations and
    where it has more.
    """
    if sweep == "width":
        ranges = {"P": list(points)}
    elif sweep == "rows":
        light = [n for n in points if points[n].facts["cholesky_share"] < SHARE]
        ranges = {"N, Gram matrix": light, "N, Cholesky": [n for n in points if n not in light]}
    else:
        return {}
    found = {}
    for what, sizes in ranges.items():
        sizes = upper_half([size for size in sizes if row in points[size].timings])
        if len(sizes) > 1:
            x = [points[size].facts["parameters"] if sweep == "width" else size for size in sizes]
            found[what] = slope(x, [points[size].timings[row].median for size in sizes]), sizes
    return found
