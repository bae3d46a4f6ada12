"""Steps over batches: their memory, their speed beside the step on all rows at once, and what they reach beside Adam.

    python -m bench.streaming [memory | speed | adam] [--solver NAME] [--width N] [--threads N] [--out FILE]

The problem has 100,000 rows of 10 numbers, a 10-80-80-80-1 network of sigmoids (13,921 parameters), float64, and batches of
2,000 rows; its weights are PyTorch's times 3, for LM and Adam alike, since sigmoids flatten what passes through them. Memory is
the peak above what is resident after the import, data included, in a process for each solver. Speed is on as many rows as fit
at once: each step from the same parameters, streamed and whole in turn, and the two steps compared. Seconds of one thread are
processor time, so that other jobs on the machine matter less.
"""

import argparse
import json
import math
import subprocess
import sys
from statistics import median
from time import perf_counter, process_time

import torch
import torch.nn.functional as F

import pgdfast

from .memory_probe import _resident, peak

ROWS, INPUTS, WIDTH, BATCH = 100_000, 10, 80, 2_000
PARTS = {"cg": dict(solver="cg"), "primal": dict(solver="primal")}


def problem(rows, width=WIDTH, batch=BATCH):
    """(network, x, y, batches). The function's directions are drawn after x: each number of rows has its own."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes = (INPUTS, width, width, width, 1)
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (torch.nn.Linear(a, b), torch.nn.Sigmoid())]
    network = torch.nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for layer in network[::2]:
            layer.weight.mul_(3.0)
    x = 2 * torch.rand(rows, INPUTS, generator=generator, dtype=torch.float64) - 1
    a, b, c = torch.randn(3, INPUTS, 1, generator=generator, dtype=torch.float64) / INPUTS**0.5
    y = torch.sin(x @ a) + 0.3 * (x @ b).tanh() * (x @ c)
    y = (y - y.mean()) / y.std()
    return network, x, y, list(zip(x.split(batch), y.split(batch), strict=True))


def clock():
    """Seconds: of this process where it has one thread, else on the wall."""
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


def loss_on(network):
    """The closure of a batch."""
    return lambda batch: F.mse_loss(network(batch[0]), batch[1])


def total(network, batches, rows):
    """The loss on all rows, batch by batch."""
    with torch.no_grad():
        return sum(float(loss_on(network)(b)) * len(b[0]) for b in batches) / rows


def memory(solver, steps, rows=ROWS, width=WIDTH):
    """Steps over batches in this process: peak above import, seconds and losses."""
    start = _resident()
    network, _, _, batches = problem(rows, width)
    opt = pgdfast.LM(network.parameters(), **PARTS[solver])
    losses, seconds, first = [], [], clock()
    for _ in range(steps):
        losses.append(float(opt.step(loss_on(network), batches)))
        seconds.append(clock() - first)
    report = opt.report
    count = sum(p.numel() for p in network.parameters())
    return {
        "solver": report.solver, "rows": rows, "parameters": count, "above_import": peak() - start,
        "matrix": 8 * count**2, "losses": losses, "after": total(network, batches, rows), "seconds": seconds,
        "parts": report.parts, "kept": report.kept, "iterations": report.iterations,
    }


def adam(seconds, rows=ROWS, width=WIDTH, lr=1e-3, cosine=False):
    """Adam on the same batches for so many seconds, in a new order each time: (steps, loss).

    cosine: lr falls to 0 by a cosine.
    """
    network, _, _, batches = problem(rows, width)
    opt = torch.optim.Adam(network.parameters(), lr=lr)
    order, taken, start, spent = torch.Generator().manual_seed(1), 0, clock(), 0.0
    while spent < seconds:
        for k in torch.randperm(len(batches), generator=order).tolist():
            if cosine:
                opt.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * min(spent / seconds, 1))) / 2
            opt.zero_grad()
            loss_on(network)(batches[k]).backward()
            opt.step()
            taken, spent = taken + 1, clock() - start
            if spent >= seconds:
                break
    return taken, total(network, batches, rows)


def speed(solver, rows, width, rounds, batch=BATCH, **options):
    """Seconds of a streamed and of a whole step from the same parameters, in turn, and how far apart the steps are.

    remade: of a streamed step that keeps no programs.
    """
    network, x, y, batches = problem(rows, width, batch)
    start = [p.detach().clone() for p in network.parameters()]
    loss, whole = loss_on(network), (x, y)
    made = {
        name: pgdfast.LM(network.parameters(), damping=1e-2, damping_rule="constant", solver=solver, **options, **kept)
        for name, kept in (("streamed", {}), ("whole", {}), ("remade", {"memory": 0.0}))
    }
    taken = {name: [] for name in made}
    for k in range(rounds + 1):
        moved = {}
        for name, opt in made.items():
            with torch.no_grad():
                for p, value in zip(network.parameters(), start, strict=True):
                    p.copy_(value)
            first = clock()
            if name == "whole":
                opt.step(lambda: loss(whole))
            else:
                opt.step(loss, batches)
            if k:   # the first finds the structure
                taken[name].append(clock() - first)
            moved[name] = torch.cat([(p.detach() - v).reshape(-1) for p, v in zip(network.parameters(), start, strict=True)])
    apart = float((moved["streamed"] - moved["whole"]).norm() / moved["whole"].norm())
    seconds = {name: median(values) for name, values in taken.items()}
    return {
        "solver": solver, "rows": rows, "batch": batch, "parameters": len(moved["whole"]), **seconds,
        "ratio": median(a / b for a, b in zip(taken["streamed"], taken["whole"], strict=True)), "apart": apart,
        "kept": made["streamed"].report.kept, "reruns": made["remade"].report.reruns,
        "iterations": made["streamed"].report.iterations,
    }


def in_a_process(*arguments):
    """What this file prints in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "bench.streaming", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Run a part, or all, and print JSON and sentences."""
    parser = argparse.ArgumentParser(prog="python -m bench.streaming")
    parser.add_argument("part", nargs="?", default="all", choices=["all", "memory", "speed", "adam", "one"])
    parser.add_argument("--solver", default="cg", choices=sorted(PARTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.part == "one":
        print(json.dumps(memory(given.solver, given.steps, given.rows, given.width)))
        return
    found = {"threads": given.threads}
    if given.part in ("all", "memory", "adam"):
        for solver in PARTS if given.part == "all" else [given.solver]:
            steps = given.steps if solver == given.solver else 2
            sizes = ("--threads", given.threads, "--rows", given.rows, "--width", given.width)
            one = in_a_process("one", "--solver", solver, "--steps", steps, *sizes)
            found[solver] = one
            print(
                f"{solver}: {one['above_import'] / 1e9:.2f} GB above import at {one['rows']:,} rows and {one['parameters']:,} "
                f"parameters ({one['above_import'] / one['matrix']:.2f} of the P x P matrix), {steps} steps in "
                f"{one['seconds'][-1]:.1f} s, loss {one['losses'][0]:.3e} -> {one['after']:.3e}, {one['kept']} of "
                f"{one['parts']} programs kept"
            )
    if given.part in ("all", "adam"):
        seconds, after = found[given.solver]["seconds"][-1], found[given.solver]["after"]
        found["adam"] = {}
        for lr, cosine in ((1e-3, False), (1e-2, False), (1e-2, True), (3e-2, True)):
            taken, loss = adam(seconds, given.rows, given.width, lr, cosine)
            name = f"lr {lr:g}{', cosine' if cosine else ''}"
            found["adam"][name] = {"steps": taken, "loss": loss}
            print(f"Adam, {name}: {taken} steps in the same {seconds:.1f} s, loss {loss:.3e}, {loss / after:.1f} times LM's")
    if given.part in ("all", "speed"):
        found["speed"] = []
        for solver, rows, width in (("primal", 20_000, 24), ("cg", 20_000, 80), ("dual", 1_000, 80)):
            one = speed(solver, rows, width, given.rounds, BATCH if solver != "dual" else 250)
            found["speed"].append(one)
            print(
                f"{solver}, {rows:,} rows, {one['parameters']:,} parameters: streamed {one['streamed'] * 1e3:.1f} ms, whole "
                f"{one['whole'] * 1e3:.1f} ms, ratio {one['ratio']:.3f}, steps {one['apart']:.1e} apart; nothing kept "
                f"{one['remade'] * 1e3:.1f} ms, {one['reruns']} closures again"
            )
    if given.out:
        with open(given.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
