"""This tree against another one, pair by pair: `python -m bench.against OTHER_TREE [--rounds N] [--threads N] [ROW ...]`.

Each tree runs in a process of its own, one at a time and in turn; a ratio is this tree's time over the other's in the same
round. What a row computes is compared, too. The other tree needs a core that was built in place (`python setup.py build_ext
--inplace`).
"""

import argparse
import base64
import json
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 0.02   # a batch of calls lasts about this long


def make_rows():
    """{name: function that makes (call, result)}: a call is timed, and result() is what to compare, a flat tensor."""
    import torch

    import pgdfast
    from bench.peers import LM
    from bench.problems import PROBLEMS

    def step(name):
        def make():
            lm = LM(PROBLEMS[name])
            return lm.step, lambda: lm.taken()
        return make

    def default(name, **options):
        def make():
            problem = PROBLEMS[name]
            torch.manual_seed(0)
            model = problem.model()
            start = [p.detach().clone() for p in model.parameters()]
            closure, optimizer = problem.closure(model), pgdfast.LM(model.parameters(), **options)
            optimizer.step(closure)
            state = optimizer.state_dict()

            def result():
                optimizer.load_state_dict(state)
                with torch.no_grad():
                    for p, value in zip(model.parameters(), start, strict=True):
                        p.copy_(value)
                optimizer.step(closure)
                return torch.cat([p.detach().flatten() for p in model.parameters()])
            return lambda: optimizer.step(closure), result
        return make

    def product(name):
        def make():
            problem = PROBLEMS[name]
            model = problem.model()
            lin = pgdfast.linearize(problem.closure(model), list(model.parameters()))
            v = torch.randn(lin.num_parameters, generator=torch.Generator().manual_seed(1))
            return lambda: lin.ggn(v), lambda: lin.ggn(v)
        return make

    def dampings(name):
        def make():
            problem = PROBLEMS[name]
            model = problem.model()
            lin = pgdfast.linearize(problem.closure(model), list(model.parameters()))
            mus = [10.0**-k for k in range(8)]
            return lambda: pgdfast.solve(lin, mus).step, lambda: pgdfast.solve(lin, mus).step.flatten()
        return make

    def ensemble(count, **options):
        def make():
            torch.manual_seed(0)
            layers = [torch.nn.Linear(1, 80), torch.nn.Tanh(), torch.nn.Linear(80, 80), torch.nn.Tanh(), torch.nn.Linear(80, 1)]
            net = torch.nn.Sequential(*layers).double()
            networks = pgdfast.functional_ensemble(net, count)
            x = torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None]
            optimizer = pgdfast.LM(networks.parameters(), ensemble=count, **options)

            def call():
                return optimizer.step(lambda: ((networks(x) - torch.sin(5 * x)) ** 2).mean((1, 2)))
            first = call().clone()
            return call, lambda: first
        return make

    rows = {f"{name} step": step(name) for name in PROBLEMS}
    rows |= {f"{name} default step": default(name) for name in "ABCEG"}
    rows |= {f"{name} default step, {options}": default(name, **given) for name, options, given in (
        ("A", "delayed + chord", {"damping_rule": "delayed", "acceleration": "chord"}),
        ("A", "sweep", {"damping_rule": "sweep"}),
        ("A", "armijo", {"line_search": "armijo"}), ("A", "marquardt", {"scaling": "marquardt"}))}
    rows |= {f"{name} J^T J v": product(name) for name in "ACF"}
    rows |= {f"{name} 8 dampings": dampings(name) for name in "AB"}
    rows |= {f"{count} networks, {rule}": ensemble(count, damping_rule=rule) for count, rule in
             ((8, "constant"), (64, "constant"), (64, "gain-ratio"))}
    return rows


def work(tree, threads):
    """Answer requests on stdin: the rows, the result of one, or the seconds per call of a batch of one."""
    sys.path.insert(0, tree)
    import pgdfast
    assert Path(pgdfast.__file__).is_relative_to(tree), f"{pgdfast.__file__} is not of {tree}"
    sys.path[0] = str(ROOT)
    from time import perf_counter

    import torch
    torch.set_num_threads(threads)
    rows, made, calls = make_rows(), {}, {}
    for line in sys.stdin:
        what, _, name = line.strip().partition(" ")
        if what == "rows":
            answer = list(rows)
        elif what == "result":
            made[name] = rows[name]()
            answer = base64.b64encode(made[name][1]().detach().double().contiguous().numpy().tobytes()).decode()
            start = perf_counter()
            made[name][0]()
            calls[name] = max(1, min(500, int(SECONDS / (perf_counter() - start))))
        elif what == "forget":
            made.pop(name, None)
            answer = None
        else:
            call = made[name][0]
            call()
            start = perf_counter()
            for _ in range(calls[name]):
                call()
            answer = (perf_counter() - start) / calls[name]
        print(json.dumps(answer), flush=True)


class Worker:
    """A process with one tree's library."""

    def __init__(self, tree, threads):
        command = [sys.executable, __file__, "--worker", str(tree), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, text):
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self._process.wait()}; its last lines say why")
        return json.loads(line)


def difference(a, b):
    """||a - b|| / ||b||."""
    import numpy as np
    a, b = (np.frombuffer(base64.b64decode(x)) for x in (a, b))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) if a.shape == b.shape else float("inf")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", nargs="?", help="the root of the other tree")
    parser.add_argument("rows", nargs="*", help="only rows that contain one of these")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.worker, given.threads)
    if given.other is None:
        parser.error("needed: the root of the other tree")
    ours, theirs = Worker(ROOT, given.threads), Worker(Path(given.other).resolve(), given.threads)
    print(f"{'':34} {'this':>10} {'other':>10}   ratio, median (quartiles)   difference")
    for row in ours.ask("rows"):
        if given.rows and not any(part in row for part in given.rows):
            continue
        theirs.ask("rows")
        apart = difference(ours.ask(f"result {row}"), theirs.ask(f"result {row}"))
        pairs = []
        for number in range(given.rounds):
            order = (ours, theirs) if number % 2 else (theirs, ours)
            seconds = {worker: worker.ask(f"time {row}") for worker in order}
            pairs.append((seconds[ours], seconds[theirs]))
        for worker in (ours, theirs):
            worker.ask(f"forget {row}")
        ratios = [a / b for a, b in pairs]
        low, _, high = quantiles(ratios, n=4)
        a, b = (1e3 * median(side) for side in zip(*pairs, strict=True))
        spread = f"{median(ratios):5.3f} ({low:.3f} to {high:.3f})"
        print(f"{row:34} {a:7.3f} ms {b:7.3f} ms   {spread}      {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
