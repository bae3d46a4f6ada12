"""Compares linearizations of random closures with the oracle: gradient, products, Jacobian, Gram matrix and step."""

from __future__ import annotations

import collections
import time
import warnings

import torch

import pgdfast
from pgdfast.linear import Linearizer

from .oracle import truth
from .random_closures import RandomClosure, Unfit
from .runner import EXACT_CG

ROUNDS = 2   # points of each closure: the second is read from a structure that is known
TOLERANCE, LEAST_SLOPE, ROUNDING = 1e-9, 1e-6, 1e-13
FLOAT32_CONSTANTS, LOOSE = {"celu", "hardsigmoid"}, 1e-5   # PyTorch's own derivatives of these are 3e-8 off in float64
AGREES, DIFFERS, RAISED, SKIPPED = "agrees", "differs", "raises", "skipped"


def relative(a, b) -> float:
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        return float("inf")
    error = float((a - b).norm()) / (float(b.norm()) or 1.0)
    return error if error == error else float("inf")


def differences(lin, closure: RandomClosure, found, v, u) -> dict[str, float]:
    """{what: relative difference} of a linearization from the truth; of curvatures, the nearest of the acceptable."""
    J, g = found.J, found.gradient
    result = {"gradient": relative(lin.gradient(), g), "loss": abs(float(lin.loss) - found.loss) / (abs(found.loss) or 1.0)}
    if closure.squares:
        return result | {"dense": relative(lin.dense(), J), "J v": relative(lin.jvp(v), J @ v),
                         "J^T u": relative(lin.vjp(u), J.T @ u), "Gram": relative(lin.gram(), J @ J.T)}
    products, dense = lin.ggn(v), lin.dense()
    curvatures = [J.T @ (H[:, None] * J if H.dim() == 1 else H @ J) for H in found.curvatures]
    G = min(curvatures, key=lambda G: relative(products, G @ v))
    pulled = lin.vjp(lin.jvp(v))
    return result | {"G v": relative(products, G @ v), "J^T J v": relative(pulled, G @ v),
                     "dense": relative(dense.T @ dense, G), "Gram": relative(lin.gram().trace(), G.trace())}


def compare(closure: RandomClosure, rounds: int = ROUNDS) -> tuple[str, str]:
    """(verdict, why) of a closure at some points."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _compare(closure, rounds)


def _compare(closure, rounds):
    linearizer, worst = Linearizer(closure.params), ("", 0.0)
    for k in range(rounds):
        try:
            if k:
                closure.next()
            closure.values(checked=True)
            found = truth(closure)
            if not bool(found.J.isfinite().all()) or not bool(found.gradient.isfinite().all()):
                raise Unfit("derivatives are not finite")
            if 0 < float(found.J.norm()) < LEAST_SLOPE:
                raise Unfit("no slope but rounding")
            if 0 < float(found.gradient.norm()) < ROUNDING * float(found.J.norm() * found.slope.norm()):
                raise Unfit("no gradient but rounding")
            if any(0 < abs(found.size(H)) < LEAST_SLOPE**2 * float(H.norm() * found.J.norm() ** 2) for H in found.curvatures):
                raise Unfit("no curvature but rounding")
        except Unfit as reason:
            return SKIPPED, str(reason)
        generator = torch.Generator().manual_seed(k)
        v = torch.randn(found.J.shape[1], generator=generator, dtype=torch.float64)
        u = torch.randn(len(found.J), generator=generator, dtype=torch.float64)
        mu = found.mu(torch.float64)
        try:
            errors = differences(linearizer(closure.closure), closure, found, v, u)
            before = torch.cat([p.detach().reshape(-1) for p in closure.params])
            pgdfast.LM(closure.params, damping=mu, damping_rule="constant", cg=EXACT_CG).step(closure.closure)
            step = before - torch.cat([p.detach().reshape(-1) for p in closure.params])
            errors["step"] = min(relative(step, wanted) for wanted in found.steps(mu))
            with torch.no_grad():
                for p, part in zip(closure.params, before.split([p.numel() for p in closure.params]), strict=True):
                    p.copy_(part.view(p.shape))
        except Exception as error:   # whatever a closure meets is what this records
            return RAISED, f"{type(error).__name__}: {error}".split("\n")[0]
        name = max(errors, key=errors.get)
        if not errors[name] <= (LOOSE if FLOAT32_CONSTANTS & {node.name for node in closure.nodes} else TOLERANCE):
            return DIFFERS, f"{name} {errors[name]:.1e} off at point {k + 1}"
        worst = max(worst, (name, errors[name]), key=lambda pair: pair[1])
    return AGREES, f"{worst[0]} {worst[1]:.0e}"


def smallest(seed: int) -> str:
    """The shortest prefix of a closure's operations that fails when its last value is returned as residuals."""
    for until in range(1, len(RandomClosure(seed).nodes) + 1):
        closure = RandomClosure(seed)
        del closure.nodes[until:]
        closure.loss_name, closure.other = "residuals", 0
        closure.target = closure.values()[-1].detach() * 0.9
        if closure.target.numel() == 1:
            closure.loss_name = "mean square"
        verdict, why = compare(closure)
        if verdict in (DIFFERS, RAISED):
            return f"{' > '.join(node.name for node in closure.nodes)}: {why}"
    return "only with its loss"


def run(seeds):
    """Yield (seed, verdict, why, closure)."""
    for seed in seeds:
        closure = RandomClosure(seed)
        yield seed, *compare(closure), closure


def main(count: int, first: int = 0) -> int:
    """Print the seeds that disagree, and counts; the exit code is 1 if there are any."""
    start, verdicts, used = time.perf_counter(), collections.Counter(), collections.Counter()
    for seed, verdict, why, closure in run(range(first, first + count)):
        verdicts[verdict] += 1
        used.update(node.name for node in closure.nodes)
        if verdict in (DIFFERS, RAISED):
            shortest = smallest(seed)
            print(f"seed {seed} {verdict}: {why[:160]}\n    {closure.described()}\n    smallest: {shortest[:300]}", flush=True)
    counts = ", ".join(f"{n} {name}" for name, n in verdicts.most_common())
    print(f"{count} random closures from {len(used)} operations: {counts}; {time.perf_counter() - start:.0f} s")
    return int(verdicts[DIFFERS] + verdicts[RAISED] > 0)
