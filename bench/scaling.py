"""What a step over R ranks takes, on paper: numbers sent, memory and seconds of each solver, and curves of them.

    python -m bench.scaling [--out DIR]

docs/scaling.md has the model. Rates of one core of this machine are measured (`python -m bench.scaling --measure`); those of a
GPU are its vendor's peaks times assumed shares, named below.

Index legend: R ranks, M residuals, P parameters.
"""

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time

# Of pgdfast/parts: numbers of J^T J in one sum; rows of K in a block; orders from which ranks share a factor, and its panels.
MATRIX_AT_ONCE, ROWS_AT_ONCE, SHARED_FROM, PANEL = 1 << 22, 64, 2048, 256


@dataclass(frozen=True)
class Machine:
    """One rank. Rates in operations per second (a multiply-add is two), links in bytes per second each way.

    products: of J^T J and of K; cholesky: of a factor; sweep: of the narrow products in J v. near: of a link to the ranks of
    the same node, of which there are `node`; far: to others. latency: seconds of a collective. width: bytes of a number.
    shares: whether all ranks together make large factors, as they do with the core on CPUs (pgdfast/parts/cholesky.py).
    """

    name: str
    products: float
    cholesky: float
    sweep: float
    near: float
    far: float
    node: int
    latency: float
    width: int
    shares: bool


# Rates by --measure on one core, float64; links by a ring of two gloo processes over loopback; far: 25 Gbit/s, assumed.
CORE = Machine("CPU core, gloo", 64e9, 60e9, 34e9, 2e9, 25e9 / 8, 64, 40e-6, 8, True)
# NVIDIA's figures for an H100 SXM: 67 TFLOP/s in float32 without tensor cores, NVLink 450 GB/s each way, InfiniBand NDR 50 GB/s
# for each GPU. Assumed shares: 0.7 of the peak for products, 0.35 for a Cholesky factor, 0.25 for sweeps, 0.8 of the links; 20
# microseconds for a collective within a node, and 10 more for every doubling.
H100 = Machine("H100, NCCL", 0.7 * 67e12, 0.35 * 67e12, 0.25 * 67e12, 0.8 * 450e9, 0.8 * 50e9, 8, 20e-6, 4, False)


@dataclass(frozen=True)
class Work:
    """A step. For each residual: sweep, operations of J v; factors, numbers in its (a, g); kept, of its program.

    gram: operations for one element of K. iterations: of CG. outputs: of a row, sweeps that make its factors.
    """

    name: str
    solver: str
    residuals: float
    parameters: float
    sweep: float
    factors: float = 0.0
    kept: float = 0.0
    gram: float = 0.0
    iterations: int = 100
    outputs: int = 1


def network(solver, widths, rows, **others):
    """The step of a plain network with one output."""
    pairs = list(zip(widths, widths[1:], strict=False))
    P = sum((a + 1) * b for a, b in pairs)
    sweep = 2 * sum(a * b for a, b in pairs) + 2 * sum(a * b for a, b in pairs[1:])
    factors = sum(a + b for a, b in pairs)
    return Work("-".join(map(str, widths)), solver, rows, P, sweep, factors, 2 * sum(widths), 2.0 * factors, **others)


def shared(work, machine):
    """Whether the factor of a step is made by all ranks together."""
    order = {"primal": work.parameters, "dual": work.residuals, "cg": 0}[work.solver]
    return machine.shares and order >= SHARED_FROM


def sent(work, ranks, machine):
    """Numbers that a rank sends in a step without corrections, by what they are."""
    M, P, share = work.residuals, work.parameters, (ranks - 1) / ranks
    found = {"residual": share * M}
    if shared(work, machine):
        order = P if work.solver == "primal" else M
        found["factor"] = share * order * (order + PANEL) / 2
    if work.solver == "primal":
        rows = max(1, min(MATRIX_AT_ONCE // P, P // 8))
        found |= {"J^T J": 2 * share * P * (P + rows) / 2, "J^T r": 2 * share * P, "step": share * P}
    elif work.solver == "cg":
        found["products"] = 2 * share * P * (work.iterations + 2)
    else:
        found |= {"factors": share * M * work.factors, "K": share * M * (M + ROWS_AT_ONCE) / 2}
        found |= {"J^T y": 2 * share * P, "y": share * M}
    return found


def memory(work, ranks, machine):
    """Bytes in a rank beside one batch's tape, by what they are."""
    M, P, w = work.residuals, work.parameters, machine.width
    vectors = w * (8 * P + 4 * M)
    if work.solver == "primal":
        return {"J^T J and its factor": 1.5 * w * P * P, "vectors": vectors}
    if work.solver == "cg":
        return {"programs": w * M / ranks * work.kept, "vectors": vectors}
    return {"K and its factor": 1.5 * w * M * M, "factors": w * M * work.factors, "vectors": vectors}


def seconds(work, ranks, machine):
    """Seconds of a step by what takes them: work that is shared, work that every rank repeats, and collectives."""
    M, P, own = work.residuals, work.parameters, work.residuals / ranks
    sweep = own * work.sweep / machine.sweep
    told = sum(sent(work, ranks, machine).values()) * machine.width
    link = machine.near if ranks <= machine.node else machine.far
    calls = {"primal": 8 + math.ceil(P * P / 2 / MATRIX_AT_ONCE), "cg": 8 + work.iterations, "dual": 14}[work.solver]
    hop = 0.0 if ranks == 1 else machine.latency * (1 + max(0.0, math.log2(ranks / machine.node)) / 2)
    order = {"primal": P, "dual": M, "cg": 0}[work.solver]
    factor, split = order**3 / 3 / machine.cholesky, 1
    if ranks > 1 and shared(work, machine):
        split, calls = ranks, calls + 2 * math.ceil(order / PANEL)
    if work.solver == "primal":
        own_work = (2 + work.outputs) * sweep + own * P * P / machine.products
    elif work.solver == "cg":
        own_work = 2 * sweep * (work.iterations + 3)
        factor = 4 * P * work.iterations / machine.sweep   # dot products and updates
    else:
        own_work = (3 + work.outputs) * sweep + M * M / 2 * work.gram / ranks / machine.products
    if split > 1:
        own_work += factor / split
        factor = PANEL * order**2 / machine.cholesky   # one panel waits for the other
    return {"shared": own_work, "repeated": factor, "sent": told / link + calls * hop}


def total(work, ranks, machine):
    """Seconds of a step."""
    return sum(seconds(work, ranks, machine).values())


def strong(work, machine, counts):
    """How many times as fast as one rank."""
    return [total(work, 1, machine) / total(work, R, machine) for R in counts]


def weak(work, machine, counts):
    """Seconds with R times the rows over those of one rank."""
    return [total(replace(work, residuals=R * work.residuals), R, machine) / total(work, 1, machine) for R in counts]


def pays_until(work, machine, most=1024):
    """The most ranks, in doublings, of which each doubling still saves a quarter of the time."""
    R = 1
    while 2 * R <= most and total(work, 2 * R, machine) <= 0.75 * total(work, R, machine):
        R *= 2
    return R


WIDE = (10, 512, 512, 512, 1)
STRONG = {
    "CPU": (CORE, [network("primal", (10, 80, 80, 80, 1), 1e5), network("primal", (10, 24, 24, 24, 1), 1e5),
                   network("cg", (10, 80, 80, 80, 1), 1e5), network("dual", WIDE, 4e3)]),
    "H100": (H100, [network("primal", (10, 80, 80, 80, 1), 1e7), network("primal", (10, 80, 80, 80, 1), 1e8),
                    network("cg", WIDE, 1e7), network("dual", WIDE, 4e4)]),
}
WEAK = {
    "CPU": (CORE, [network("primal", (10, 80, 80, 80, 1), 2e4), network("primal", (10, 24, 24, 24, 1), 2e4),
                   network("cg", (10, 80, 80, 80, 1), 2e4), network("dual", WIDE, 5e2)]),
    "H100": (H100, [network("primal", (10, 80, 80, 80, 1), 1e5), network("primal", (10, 80, 80, 80, 1), 1e6),
                    network("cg", WIDE, 1e5), network("dual", WIDE, 1e3)]),
}
COUNTS = [2**k for k in range(11)]


def draw(path):
    """Both curves for both machines."""
    from pgdfast_experiments import plotting

    figure, grid, _ = plotting.panels("A step over R ranks, by the model of docs/scaling.md", 4, columns=2, legend_rows=0)
    colors, index = ("#0072B2", "#56B4E9", "#009E73", "#D55E00"), iter(grid)
    for what, problems in (("strong", STRONG), ("weak", WEAK)):
        for machine, works in problems.values():
            axes = next(index)
            for work, color in zip(works, colors, strict=True):
                values = (strong if what == "strong" else weak)(work, machine, COUNTS)
                label = f"{work.solver}, {work.name}, {work.residuals:.0e} rows".replace("e+0", "e")
                axes.plot(COUNTS, values, color=color, label=label, linewidth=1.8)
            axes.plot(COUNTS, COUNTS if what == "strong" else [1] * len(COUNTS), color="#777777", linestyle="--", label="ideal")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(COUNTS[::2], [str(R) for R in COUNTS[::2]])
            axes.set_title(f"{machine.name}: {'the same rows' if what == 'strong' else 'rows for each rank'}", fontsize=10)
            axes.set_xlabel("ranks R", fontsize=9)
            axes.set_ylabel("times as fast as one" if what == "strong" else "seconds over those of one rank", fontsize=9)
            if what == "weak":
                axes.set_ylim(0.7, 300)
            axes.legend(fontsize=6.5, frameon=False)
    figure.savefig(path)


def lines():
    """What every solver takes, and until where more ranks pay."""
    for name, problems in (("strong", STRONG), ("weak", WEAK)):
        for machine, works in problems.values():
            for work in works:
                about = f"{work.solver} {work.name}, {work.residuals:,.0f} rows, {work.parameters:,} parameters"
                yield f"{name}: {machine.name}: {about}"
                for R in (1, 8, 64, 1024):
                    one = work if name == "strong" else replace(work, residuals=R * work.residuals)
                    parts, held = seconds(one, R, machine), sum(memory(one, R, machine).values())
                    told = ", ".join(f"{what} {value:.3g} s" for what, value in parts.items())
                    yield f"  R = {R}: {sum(parts.values()):.3g} s ({told}), {held / 1e9:.3g} GB"
                if name == "strong":
                    yield f"  pays until R = {pays_until(work, machine)}, of at most 1024"


def measure():
    """The rates of one core, by processor time, so that a busy machine matters less: the best of three each."""
    import torch
    import torch.nn.functional as F

    import pgdfast
    from pgdfast.kernels import native

    from . import streaming

    torch.set_num_threads(1)
    held = []

    def made(net, x, y):
        lin = pgdfast.linearize(lambda: F.mse_loss(net(x), y), net.parameters(), check="never")
        lin.row_layout()
        held.append(lin)   # whose tensors the kernels read
        return lin.kernels()

    def best(call):
        taken = []
        for _ in range(3):
            start = process_time()
            call()
            taken.append(process_time() - start)
        return min(taken)

    H = native.normal_matrix(3000, torch.float64)
    H[:3000, :3000] = torch.eye(3000)
    found = {"cholesky": 3000**3 / 3 / best(lambda: native.factor(H, 1.0))}
    net, x, y, _ = streaming.problem(2_000)
    kernels = made(net, x, y)
    packed, K = kernels.pack(), native.gram_matrix(2_000, torch.float64)
    work = network("dual", (10, 80, 80, 80, 1), 2_000)
    found["products, K"] = 2_000**2 / 2 * work.gram / best(lambda: native.gram_rows(packed, packed, 0, 2_000, K, 0, 0))
    net, x, y, _ = streaming.problem(2_000, 24)
    kernels = made(net, x, y)
    P = kernels.num_parameters
    H = native.normal_matrix(P, torch.float64)
    found["products, J^T J"] = 2_000 * P**2 / best(lambda: kernels.add_normal(H))
    net, x, y, _ = streaming.problem(20_000)
    kernels = made(net, x, y)
    v = torch.randn(kernels.num_parameters, dtype=torch.float64)
    work = network("cg", (10, 80, 80, 80, 1), 20_000)
    found["sweep"] = work.residuals * work.sweep / best(lambda: kernels.jvp(v))
    return found


def main(arguments=None):
    """Print the table, draw the curves."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="DIR", help="a folder for scaling.png")
    parser.add_argument("--measure", action="store_true", help="print this machine's rates instead")
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps({name: f"{rate / 1e9:.0f} GFLOP/s" for name, rate in measure().items()}))
        return 0
    print(*lines(), sep="\n")
    if given.out:
        path = Path(given.out) / "scaling.png"
        draw(path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
