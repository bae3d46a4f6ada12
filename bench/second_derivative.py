"""Geodesic acceleration with the exact second derivative of the residual, and with its finite difference.

`python bench/second_derivative.py`: steps of "gain-ratio" and "delayed" to given errors on poisson-2d's small net, medians
over seeds. The exact r'' along the step is a forward-mode derivative of a forward-mode derivative (torch.func.jvp twice).
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.func import functional_call, jvp

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgdfast
from bench import poisson_2d

LEVELS = (1e-4, 1e-5, 1e-6)


@dataclass
class Exact:
    """Geodesic with -r''/2 from `second`: (P,) -> (M,), in place of the finite difference."""

    second: object
    ratio: float = 0.75

    def correct(self, model, delta):
        half = model.correction(self.second(delta) / 2)
        fits = 4 * model.size(half) <= self.ratio * model.size(delta)
        e = delta + half if fits else delta
        return e, (yield e)


def second_derivative(net, residuals):
    """(P,) -> (M,): the second derivative of the residual along a displacement, exactly."""
    names, params = zip(*net.named_parameters(), strict=True)

    def second(delta):
        parts = [part.view_as(p) for part, p in zip(delta.split([p.numel() for p in params]), params, strict=True)]
        point, tangent = (dict(zip(names, values, strict=True)) for values in ([p.detach() for p in params], parts))

        def slope(values):
            return jvp(residuals, (values,), (tangent,))[1]

        return jvp(slope, (point,), (tangent,))[1]

    return second


def run(seed, rule, acceleration, steps):
    """{error: steps}"""
    net, closure, error = poisson_2d.problem(poisson_2d.SMALL, seed)
    if acceleration == "exact":
        def residuals(values):
            with torch.no_grad():
                return torch.cat([r.reshape(-1) for r in closure(lambda x: functional_call(net, values, (x,)))])

        acceleration = Exact(second_derivative(net, residuals))
    optimizer = pgdfast.LM(net.parameters(), damping_rule=rule, acceleration=acceleration)
    found = {}
    for step in range(1, steps + 1):
        optimizer.step(closure)
        reached = error()
        for level in LEVELS:
            if reached <= level:
                found.setdefault(level, step)
        if len(found) == len(LEVELS):
            break
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for rule in ("gain-ratio", "delayed"):
        for name, acceleration in {"exact": "exact", **{f"h = {h:g}": pgdfast.Geodesic(h=h) for h in (1.0, 0.1, 0.01)}}.items():
            runs = [run(seed, rule, acceleration, given.steps) for seed in range(given.seeds)]
            medians = (statistics.median(found.get(level, math.inf) for found in runs) for level in LEVELS)
            cells = (f"{level:.0e}: {steps:g}   " for level, steps in zip(LEVELS, medians, strict=True))
            print(f"{rule:12}{name:10}", *cells, flush=True)


if __name__ == "__main__":
    main()
