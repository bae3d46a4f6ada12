"""Draws the sweeps of a results.json: python bench/plots.py DIR/results.json writes its pictures into DIR.

Time against width, depth, the number of rows and the number of parameters: ours, the peers, and PyTorch's own matrix
products or Cholesky as the floor. Thick: ours. Dashed: the floor.
"""

import json
import sys
from pathlib import Path

from pgdfast_experiments import plotting

OURS, PEERS, FLOOR = plotting.EMPHASIS[0], ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#6A3D9A"), "#777777"

STEP, GGN, ADAM = "LM step", "J^T J v", "Adam step"
STEP_PEERS = (ADAM, "torch.func step", "JAX jit step")
GGN_PEERS = ("torch.func J^T J v", "JAX J^T J v", "curvlinops J^T J v, compiled")
CHOLESKY, GEMMS = "Cholesky", "GEMMs of J^T J v"
NAMES = {
    STEP: "pgdfast LM", GGN: "pgdfast", ADAM: "Adam, eager", CHOLESKY: "Cholesky alone", GEMMS: "matrix products alone",
    "torch.func step": "torch.func by hand", "JAX jit step": "JAX jit by hand", "JAX J^T J v": "JAX, in a compiled CG",
    "torch.func J^T J v": "torch.func.linearize + vjp", "curvlinops J^T J v, compiled": "curvlinops, compiled",
}

# file: (sweep, size on the axis (None: the sweep's own), axis label, title, ours, peers, floor)
PICTURES = {
    "bench-width": ("width", None, "width", "a product J\u1d40J v", GGN, GGN_PEERS, GEMMS),
    "bench-depth": ("depth", None, "hidden layers", "one exact step", STEP, STEP_PEERS, CHOLESKY),
    "bench-rows": ("rows", None, "residuals N", "one exact step", STEP, STEP_PEERS, CHOLESKY),
    "bench-parameters": ("width", "parameters", "parameters P", "one exact step", STEP, STEP_PEERS, GEMMS),
}


def main(results):
    """Write a picture for every sweep that `results`, a path, has at two sizes or more; returns their paths."""
    results = Path(results)
    found = json.loads(results.read_text(encoding="utf-8"))
    written = []
    for name, (sweep, *about) in PICTURES.items():
        points = found["sweeps"].get(sweep, {})
        if len(points) > 1:
            path = results.with_name(f"{name}.png")
            draw(path, points, *about)
            print(f"wrote {path}")
            written.append(path)
    return written


def curves(points, size, rows):
    """{row: (sizes, median milliseconds)} of the rows that a sweep's {size: point} has at two sizes or more."""
    found = {}
    for row in rows:
        pairs = [(float(point[size] if size else key), point["rows"][row]["median_ms"])
                 for key, point in points.items() if row in point["rows"]]
        if len(pairs) > 1:
            found[row] = tuple(zip(*sorted(pairs), strict=True))
    return found


def spread(positions, gap):
    """`positions` moved apart by as little as it takes to have `gap` between neighbours, in their order."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    groups = []   # [sum of wanted first positions, members]: neighbours that touch move as one
    for rank, index in enumerate(order):
        groups.append([[positions[index] - rank * gap], [index]])
        while len(groups) > 1 and _mean(groups[-2][0]) >= _mean(groups[-1][0]):
            wanted, members = groups.pop()
            groups[-1][0] += wanted
            groups[-1][1] += members
    moved = list(positions)
    rank = 0
    for wanted, members in groups:
        for index in members:
            moved[index] = _mean(wanted) + rank * gap
            rank += 1
    return moved


def _mean(values):
    return sum(values) / len(values)


def draw(path, points, size, label, title, ours, peers, floor):
    """One picture: lines that are named at their right ends."""
    found = curves(points, size, (ours, *peers, floor))
    network = next(iter(points.values()))["network"]
    figure, (axes,), _ = plotting.panels(f"Time of {title}: {network}", 1, width=7.2, height=4.2, legend_rows=0)
    colors = {ours: OURS, **dict(zip(peers, PEERS, strict=False)), floor: FLOOR}
    for row, (x, y) in found.items():
        style = {"linestyle": (0, (4, 2))} if row == floor else {"marker": "o", "markersize": 3.5}
        axes.plot(x, y, color=colors[row], linewidth=2.6 if row == ours else 1.6, zorder=3 if row == ours else 2, **style)
    axes.set_xlabel(label, fontsize=10)
    axes.set_ylabel("milliseconds, median", fontsize=10)
    right = max(x[-1] for x, _ in found.values())
    left = min(x[0] for x, _ in found.values())
    axes.set_xlim(left / 1.1, right * 1.1)
    for which in "xy":
        plotting.log_axis(axes, which)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _name_ends(axes, found, colors, left, right)
    plotting.save(figure, path)


def _name_ends(axes, found, colors, left, right):
    """Put the name of each line beside its last point, all in one column right of the panel, apart from each other."""
    from math import log10

    low, high = axes.get_ylim()
    share = [(log10(y[-1]) - log10(low)) / (log10(high) - log10(low)) for _, y in found.values()]
    for (row, (x, y)), at in zip(found.items(), spread(share, 0.062), strict=True):
        end = (log10(x[-1]) - log10(left / 1.1)) / (log10(right * 1.1) - log10(left / 1.1))
        axes.annotate(
            NAMES[row], xy=(x[-1], y[-1]), xytext=(1.03, at), textcoords="axes fraction", color=colors[row], fontsize=9.5,
            va="center", annotation_clip=False,
            arrowprops=None if end >= 0.9 and abs(at - share[list(found).index(row)]) <= 0.03 else {
                "arrowstyle": "-", "color": colors[row], "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3, "relpos": (0, 0.5)})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("plots.py: needed: python bench/plots.py DIR/results.json")
    main(sys.argv[1])
