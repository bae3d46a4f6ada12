"""Two ranks of one thread each beside one process of one thread: seconds of a step, its equality, numbers sent.

    python -m bench.ranks [PROBLEM ...] [--ranks N] [--rounds N] [--quick] [--out FILE]

Both are timed in the same processes and in turn: rank 0 steps alone with all rows while the others wait, then all step
together, each from the same parameters. Seconds are wall time, so the machine must have an idle core for every rank; on a busy
one, processor time (of the rank that takes most, without waiting) says what an idle one would allow.
"""

import argparse
import datetime
import json
import os
import tempfile
from statistics import median
from time import perf_counter, process_time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn import functional

import pgdfast
from pgdfast.parts.group import Ranks

from . import poisson_2d, streaming
from .problems import D

AT_LEAST = 1.6   # how many times as fast two ranks are to be
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4}   # how far apart the two steps may be


class Timed(Ranks):
    """Ranks whose collectives are timed, what they wait for others included."""

    waited = 0.0

    def _run(self, collective, *arguments, **options):
        start = perf_counter()
        super()._run(collective, *arguments, **options)
        self.waited += perf_counter() - start


def share(t, rank, ranks):
    """A rank's rows of t."""
    return t.tensor_split(ranks)[rank]


def modular(rank, ranks, quick):
    """D: modular addition, whose step is primal: J^T J of 6,900 parameters and its factor."""
    model = D.model()
    x, y = D.data()
    if quick:
        x, y = x[:40], y[:40]
    mine = share(x, rank, ranks), share(y, rank, ranks)
    return model, lambda: model(x) - y, lambda: model(mine[0]) - mine[1], dict(solver="primal", damping=D.damping)


def pinn(rank, ranks, quick):
    """-Lap u = f on the unit square, 900 + 120 points, 2-64-64-48-48-1, whose step is dual."""
    net, whole, _ = poisson_2d.problem(poisson_2d.SMALL if quick else poisson_2d.LARGE, 0)
    return net, whole, lambda: whole(take=lambda t: share(t, rank, ranks)), dict(solver="dual", damping=1e-2)


def many_points(rank, ranks, quick):
    """The same with 3,600 + 480 points: K takes longer beside what is sent, and the factor is shared."""
    net, whole, _ = poisson_2d.problem(poisson_2d.LARGE, 0, *((36, 12) if quick else (3600, 480)))
    return net, whole, lambda: whole(take=lambda t: share(t, rank, ranks)), dict(solver="dual", damping=1e-2)


def wide(rank, ranks, quick):
    """The same with 1,800 + 240 points and a network 2-128-128-128-128-1: more to compute beside what is sent."""
    net, whole, _ = poisson_2d.problem((2, 128, 128, 128, 128, 1), 0, *((36, 12) if quick else (1800, 240)))
    return net, whole, lambda: whole(take=lambda t: share(t, rank, ranks)), dict(solver="dual", damping=1e-2)


def regression(rank, ranks, quick):
    """20,000 rows and 13,921 parameters, ten inputs, whose step is solved by CG."""
    net, x, y, _ = streaming.problem(400 if quick else 20_000)
    mine = share(x, rank, ranks), share(y, rank, ranks)
    return (
        net, lambda: functional.mse_loss(net(x), y), lambda: functional.mse_loss(net(mine[0]), mine[1]),
        dict(solver="cg", damping=1e-3),
    )


PROBLEMS = {"modular": modular, "pinn": pinn, "many-points": many_points, "wide": wide, "regression": regression}


def measure(name, rounds, quick):
    """In every rank: the seconds of both steps by round, what they had in common, and what was sent."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), Timed(dist.group.WORLD)
    net, whole, part, options = PROBLEMS[name](rank, ranks, quick)
    params = list(net.parameters())
    start = [p.detach().clone() for p in params]
    options["damping_rule"] = "constant"
    sides = {"alone": (pgdfast.LM(params, **options), whole)} if rank == 0 else {}
    sides["ranks"] = pgdfast.LM(params, process_group=group, **options), part
    seconds = {"alone": [], "ranks": []}
    phases, waited, moved = {side: [] for side in seconds}, [], {}
    processor = {"alone": [], "ranks": []}
    for k in range(rounds + 1):
        for side in seconds if k % 2 else reversed(seconds):
            with torch.no_grad():
                for p, value in zip(params, start, strict=True):
                    p.copy_(value)
            dist.barrier()
            if side not in sides:
                continue
            opt, closure = sides[side]
            group.waited, first, used = 0.0, perf_counter(), process_time()
            opt.step(closure)
            if k:   # the first finds the structure
                seconds[side].append(perf_counter() - first)
                processor[side].append(process_time() - used)
                phases[side].append(dict(opt.report.seconds))
                if side == "ranks":
                    waited.append(group.waited)
            moved[side] = torch.cat([(p.detach() - v).reshape(-1) for p, v in zip(params, start, strict=True)])
    busiest = torch.tensor([median(processor["ranks"])])
    dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
    if rank:
        return None
    report = sides["ranks"][0].report
    return {
        "problem": name, "ranks": ranks, "solver": report.solver, "residuals": report.residuals,
        "parameters": len(moved["ranks"]), "dtype": str(params[0].dtype).removeprefix("torch."),
        "alone_seconds": median(seconds["alone"]), "ranks_seconds": median(seconds["ranks"]),
        "faster": median(a / b for a, b in zip(seconds["alone"], seconds["ranks"], strict=True)),
        "alone_processor": median(processor["alone"]), "ranks_processor": float(busiest), "by_round": seconds,
        "apart": float((moved["ranks"] - moved["alone"]).norm() / moved["alone"].norm()),
        "allowed": ALLOWED[params[0].dtype], "iterations": report.iterations, "trials": report.trials, "sent": report.sent,
        "collectives": median(waited),
        "phases": {side: {what: median(one[what] for one in values) for what in values[0]} for side, values in phases.items()},
    }


def _rank(rank, ranks, folder, names, rounds, quick):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=datetime.timedelta(minutes=10)
    )
    found = [measure(name, rounds, quick) for name in names]
    if rank == 0:
        with open(f"{folder}/found.json", "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


def run(names, ranks=2, rounds=10, quick=False):
    """What `measure` finds for each problem, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (ranks, folder, tuple(names), rounds, quick), nprocs=ranks)
        with open(f"{folder}/found.json", encoding="utf-8") as file:
            return json.load(file)


def verdict(one, ranks=2):
    """What is wrong with a measurement, "" where nothing is."""
    if not one["apart"] <= one["allowed"]:
        return f"the steps are {one['apart']:.1e} apart, and {one['allowed']:.0e} is allowed"
    if ranks == 2 and not one["faster"] >= AT_LEAST:
        return f"two ranks must be at least {AT_LEAST} times as fast"
    return ""


def lines(one):
    """A measurement in sentences."""
    alone, ranks = (one["phases"][side] for side in ("alone", "ranks"))
    told = ", ".join(f"{what} {1e3 * alone[what]:.1f} -> {1e3 * ranks[what]:.1f}" for what in ranks)
    low, high = (f(a / b for a, b in zip(one["by_round"]["alone"], one["by_round"]["ranks"], strict=True)) for f in (min, max))
    yield (
        f"{one['problem']}: {one['solver']}, {one['residuals']:,} residuals, {one['parameters']:,} parameters, {one['dtype']}: "
        f"alone {1e3 * one['alone_seconds']:.1f} ms, {one['ranks']} ranks {1e3 * one['ranks_seconds']:.1f} ms, "
        f"{one['faster']:.2f} times as fast ({low:.2f} to {high:.2f}); of processor time "
        f"{1e3 * one['alone_processor']:.1f} and {1e3 * one['ranks_processor']:.1f} ms, "
        f"{one['alone_processor'] / one['ranks_processor']:.2f} times as fast"
    )
    yield (
        f"  ms by phase, alone -> ranks: {told}; in collectives {1e3 * one['collectives']:.1f}; {one['sent']:,.0f} numbers "
        f"sent by a rank, {one['iterations']} iterations, steps {one['apart']:.1e} apart"
    )


def main(arguments=None):
    """Time, print, judge; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__.split("\n")[0])
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"of {', '.join(PROBLEMS)} (default: all)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="tiny problems, to see that it runs")
    parser.add_argument("--out", help="a JSON file for the figures")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.problems if name not in PROBLEMS]
    if unknown:
        parser.error(f"unknown problem {unknown[0]!r}; there are {', '.join(PROBLEMS)}")
    found, failed = run(given.problems or PROBLEMS, given.ranks, given.rounds, given.quick), False
    for one in found:
        print(*lines(one), sep="\n")
        wrong = "" if given.quick and one["apart"] <= one["allowed"] else verdict(one, given.ranks)
        if wrong:
            failed = True
            print(f"  FAIL: {wrong}")
    if given.out:
        with open(given.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
