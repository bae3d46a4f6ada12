"""One step of each optimizer, and the parts of ours, timed in turn; the ratios that must hold are asserted."""

import os
from itertools import cycle
from statistics import median
from time import perf_counter

import pytest
import torch

import pgdfast
from pgdfast.linear import Linearizer

from .interleave import Ratio, Recorded, Row, interleaved
from .peers import CONTENDERS, LM, Adam, Missing, TorchFunc, TorchLevenbergMarquardt
from .problems import A, B
from .tables import report

ROUNDS = int(os.environ.get("PGDFAST_BENCH_ROUNDS", "40"))
PARTS = ("closure", "closure, tape read", "dual solve", "J v", "J^T u", "J^T J v", "J J^T", "GEMM 512")
PROBLEMS = {problem.name: problem for problem in (A, B)}

# By the median over the rounds: our step over Adam's at most, and the exact peers' steps over ours at least.
AT_MOST_ADAM = {"A": 0.8, "B": 1.5}
AT_LEAST_FASTER = {"A": 8.0, "B": 15.0}

recorded = Recorded()
pytestmark = pytest.mark.benchmark(timer=recorded)


@pytest.fixture(scope="module", params=PROBLEMS)
def measured(request):
    """(problem, {row name: Timing}, {peer name: why it is missing}), all rows of one problem timed in turn."""
    problem = PROBLEMS[request.param]
    rows, missing = [], {}
    for contender in CONTENDERS:
        try:
            rows.append(_step_row(contender, problem))
        except Missing as reason:
            missing[contender.name] = str(reason)
    timings = interleaved(rows + _part_rows(problem), ROUNDS)
    report(request.config, _table(problem, timings, missing))
    return problem, timings, missing


def _step_row(contender, problem):
    """A row of steps; every batch starts from the same parameters."""
    made = contender(problem)
    params = list(made.model.parameters())
    start = [p.detach().clone() for p in params]

    @torch.no_grad()
    def reset():
        for p, value in zip(params, start, strict=True):
            p.copy_(value)

    return Row(contender.name, made.step, reset, problem.dual_flops if made.exact else None)


def _part_rows(problem):
    model = problem.model()
    closure = problem.closure(model)
    linearizer = Linearizer(model.parameters())
    # Two linearizations of one structure in turn: what the core keeps of one is not there for the next.
    pair = cycle([linearizer(closure), linearizer(closure)])
    lin = Linearizer(model.parameters())(closure)
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(lin.num_parameters, generator=generator)
    u = torch.randn(lin.num_residuals, generator=generator)
    n = 512
    left, right, product = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    calls = {
        "closure": (closure, None),
        "closure, tape read": (lambda: linearizer(closure).operator, None),   # a tape that was read once is read faster
        "dual solve": (lambda: pgdfast.solve(next(pair), problem.damping, solver="dual"), problem.dual_flops),
        "J v": (lambda: lin.jvp(v), problem.sweep_flops),
        "J^T u": (lambda: lin.vjp(u), problem.sweep_flops),
        "J^T J v": (lambda: lin.ggn(v), 2 * problem.sweep_flops),
        "J J^T": (lambda: next(pair).gram(), problem.gram_flops),
        "GEMM 512": (lambda: torch.mm(left, right, out=product), 2 * n**3),
    }
    assert tuple(calls) == PARTS
    return [Row(name, call, flops=flops) for name, (call, flops) in calls.items()]


@pytest.mark.parametrize("row", [*(contender.name for contender in CONTENDERS), *PARTS])
def test_time(benchmark, measured, row):
    problem, timings, missing = measured
    if row in missing:
        pytest.skip(missing[row])
    timing = timings[row]
    over_ours = Ratio.of(timing, timings[LM.name])
    benchmark.group = problem.name
    benchmark.extra_info.update(
        threads=timing.threads, gflops=timing.gflops, over_lm_step=vars(over_ours),
        median_by_threads={n: median(seconds) for n, seconds in timing.seconds.items()},
    )
    recorded.hand_over(benchmark, timing.best)

    if row == Adam.name:
        ratio = Ratio.of(timings[LM.name], timing)
        assert ratio.median <= AT_MOST_ADAM[problem.name], f"the LM step over Adam's: {ratio}"
    elif row == _bounded_peer(timings):
        assert over_ours.median >= AT_LEAST_FASTER[problem.name], f"{row} over the LM step: {over_ours}"


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if c.exact], ids=lambda c: c.name)
def test_step_is_right(benchmark, measured, contender, lines):
    """Every exact step is that of the float64 reference to four digits."""
    problem, _, missing = measured
    if contender.name in missing:
        pytest.skip(missing[contender.name])
    made = contender(problem, lr=1.0)
    params = list(made.model.parameters())
    lin = pgdfast.reference.linearize(problem.closure(made.model), params)
    solution = pgdfast.reference.solve(lin, problem.damping, solver="dual")
    assert solution.status == "solved"
    before, start = _flat(params), perf_counter()
    made.step()
    recorded.hand_over(benchmark, [perf_counter() - start])
    error = float((before - _flat(params) - solution.step).norm() / solution.step.norm())
    eigenvalues = torch.linalg.eigvalsh(lin.gram()) + problem.damping
    condition = float(eigenvalues[-1] / eigenvalues[0])
    allowed = 1e-4
    benchmark.group = f"{problem.name}, first step"
    benchmark.extra_info.update(relative_error=error, allowed=allowed, condition=condition)
    lines.append(f"{problem.name}: {contender.name}: relative error {error:.1e}, allowed {allowed:.1e}, "
                 f"condition of J J^T + mu I {condition:.1e}")
    assert error <= allowed


def _bounded_peer(timings):
    """The name of the exact peer, doing the same work as ours, that the bounds speak of."""
    return TorchLevenbergMarquardt.name if TorchLevenbergMarquardt.name in timings else TorchFunc.name


def _flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params]).double()


def _table(problem, timings, missing):
    """The figures of one problem as lines."""
    ours, gemm = timings[LM.name], timings["GEMM 512"]
    yield (f"{problem.name}: network {'-'.join(map(str, problem.widths))}, {problem.residuals} residuals, "
           f"damping {problem.damping:g}; {ROUNDS} rounds, each row at its best thread count")
    yield (f"{'':32}{'ms (min / median / max)':>27}{'threads':>9}{'over LM step (min / median / max)':>36}"
           f"{'GFLOP/s':>10}{'of GEMM':>9}")
    for name, timing in timings.items():
        ms = [1e3 * f(timing.best) for f in (min, median, max)]
        ratio = Ratio.of(timing, ours)
        rate = "" if timing.gflops is None else (
            f"{timing.gflops:10.1f}{timing.gflops / gemm.gflops_with(timing.threads):9.0%}"
        )
        yield (f"{name:32}{ms[0]:9.3f}{ms[1]:9.3f}{ms[2]:9.3f}{timing.threads:9d}"
               f"{ratio.min:12.2f}{ratio.median:12.2f}{ratio.max:12.2f}{rate}")
    for name, reason in missing.items():
        yield f"{name:32} skipped: {reason}"
