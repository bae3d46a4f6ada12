"""Runs cases: steps against the oracle, the path that they take, and times beside Adam and torch.func."""

from __future__ import annotations

import random
import re
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial

import torch

import pgdfast

from . import by_hand
from .corpus import Case, Maker, Problem
from .oracle import BrokenCase, loss_of, real, truth

RIGHT, WRONG, RAISES, EXPECTED, BROKEN = "right", "WRONG", "raises", "raises as it should", "broken case"
SEPARATED, COUPLED, FALLBACK = "rules, rows", "rules", "fallback"
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
BY_HAND_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
EXACT_CG = pgdfast.CG(2000, 1e-12)   # where "auto" takes it
STEPS, WANDER = 3, 0.02   # steps against the oracle; how far from their start parameters are put before each
ROWS, JUDGED = 200, 40      # of batches that are timed and judged
SECONDS, FEWEST = 0.05, 3   # for each timing; calls of one that takes longer
TINY = 1e-6                 # the learning rate of timed steps, which are to stay where they are


@dataclass
class Outcome:
    """What became of a case; times in ms a step, ratios LM over the other."""

    label: str
    verdict: str
    error: float | None = None
    message: str = ""
    path: str = ""
    note: str = ""
    residuals: int = 0
    parameters: int = 0
    lm: float | None = None
    over_adam: float | None = None
    over_hand: float | None = None
    hand: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict in (WRONG, RAISES, BROKEN)

    def record(self) -> dict:
        return asdict(self)


def made(case: Case, dtype: torch.dtype, n: int, seed: int = 0) -> Problem:
    """The problem of a case; the same numbers for every dtype."""
    torch.manual_seed(seed)
    random.seed(seed)
    return case.make(Maker(dtype, n, seed))


def judge(case: Case, n: int = JUDGED, steps: int = STEPS, step=None) -> Outcome:
    """The verdict of a case. step: (problem, mu) -> callable that takes one step with it; by default LM's."""
    outcome = Outcome(case.label, RIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _judge(case, n, steps, step or partial(_lm, case.options), outcome)
        except BrokenCase as error:
            outcome.verdict, outcome.message = BROKEN, str(error)
    if case.raises and not case.either and outcome.verdict == RIGHT:
        outcome.verdict, outcome.message = WRONG, "it should raise"
    return outcome


def _judge(case, n, steps, make_step, outcome):
    subject, twin = made(case, case.dtype, n), made(case, torch.float64, n)
    params, copies = subject.params, twin.params
    start = [p.detach().clone() for p in params]
    wander = torch.Generator().manual_seed(1)
    mu, take, errors = [0.0], None, []
    for k in range(steps):
        if k:
            subject.next(), twin.next()
        with torch.no_grad():
            for p, q, s in zip(params, copies, start, strict=True):
                noise = torch.randn(torch.view_as_real(s).shape if s.is_complex() else s.shape, generator=wander)
                noise = torch.view_as_complex(noise) if s.is_complex() else noise
                p.copy_(s + WANDER * k * noise)
                q.copy_(p)
        expected = None
        if case.raises is None or case.either:
            torch.manual_seed(k)
            try:
                expected = truth(twin)
            except BrokenCase:
                raise
            except Exception as error:
                raise BrokenCase(f"the oracle fails: {type(error).__name__}: {error}") from error
            mu[0] = expected.mu(case.dtype)
            outcome.residuals, outcome.parameters = expected.J.shape
        before = _flat(params)
        torch.manual_seed(k)
        try:
            take = take or make_step(subject, mu)
            loss = take()
        except Exception as error:   # whatever a step raises is what this records
            fits = case.raises is not None and re.search(case.raises, str(error), re.S)
            outcome.verdict = EXPECTED if fits else RAISES
            outcome.message = f"{type(error).__name__}: {error}".split("\n")[0]
            return
        if expected is None:
            outcome.verdict, outcome.message = WRONG, "it should raise"
            return
        delta, tolerance = before - _flat(params), TOLERANCE[case.dtype]
        error = min(_relative(delta, wanted) for wanted in expected.steps(mu[0]))
        gap = abs(float(loss) - expected.loss) / max(abs(expected.loss), 1e-3)
        errors.append(error)
        outcome.error = max(errors)
        if not max(error, gap) <= tolerance:
            outcome.verdict = WRONG
            outcome.message = (f"step {k + 1} is {error:.1e} off" if not error <= tolerance
                               else f"the loss of step {k + 1} is {gap:.1e} off")
            if float(delta.norm()) == 0:
                outcome.message += " (no parameter moved)"
            return


def _lm(options: dict, problem: Problem, mu: list):
    """A step of LM with the damping that mu[0] says, constant over the step."""
    options = {"cg": EXACT_CG} | options
    optimizer = pgdfast.LM(problem.params, lr=1.0, damping=lambda k: mu[0], damping_rule="constant", **options)
    return lambda: optimizer.step(problem.closure)


def _flat(params) -> torch.Tensor:
    return torch.cat([real(p.detach()) for p in params]).double()


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float((a - b).norm() / b.norm()) if b.norm() > 0 else float(a.norm())
    return error if error == error else float("inf")


# --- path and times -----------------------------------------------------------------------------------------------------


def look(case: Case, outcome: Outcome, n: int = ROWS) -> None:
    """Note the path that the closure takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = made(case, case.dtype, n)
        lin = pgdfast.linearize(problem.closure, problem.params)
        if lin.kernels().name in pgdfast.backends():
            outcome.path = COUPLED if lin.row_layout() is None else SEPARATED
        else:
            outcome.path, outcome.note = FALLBACK, lin.sync_reason


def clock(case: Case, outcome: Outcome, n: int = ROWS) -> None:
    """Note the times of a step: LM's, Adam's, and by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = made(case, torch.float64, n)
        torch.manual_seed(0)
        expected = truth(problem, check_closure=False)
        mu = expected.mu(case.dtype)
        outcome.residuals, outcome.parameters = expected.J.shape
        problem = made(case, case.dtype, n)
        lm = pgdfast.LM(problem.params, lr=TINY, damping=mu, damping_rule="constant", **case.options)
        outcome.lm = _time(problem, lambda: lm.step(problem.closure))
        outcome.over_adam = outcome.lm / _time(problem, _adam(problem))
        _clock_by_hand(case, outcome, n, expected.steps(mu), mu)


def _clock_by_hand(case, outcome, n, expected, mu):
    """Note how LM compares with the fastest way by hand that gives the expected step."""
    times = {}
    for name in by_hand.ways(made(case, case.dtype, n)):
        if name == "rows" and times:
            break
        try:
            problem = made(case, case.dtype, n)
            way = by_hand.ways(problem)[name]
            torch.manual_seed(0)
            delta = by_hand.step(problem, way, mu).double()
            if min(_relative(delta, wanted) for wanted in expected) <= BY_HAND_TOLERANCE[case.dtype]:
                times[name] = _time(problem, lambda way=way, problem=problem: by_hand.step(problem, way, mu))
        except Exception:   # whatever keeps torch.func from running a closure
            continue
    if times:
        outcome.hand = min(times, key=times.get)
        outcome.over_hand = outcome.lm / times[outcome.hand]


def _adam(problem: Problem):
    adam = torch.optim.Adam(problem.params, lr=TINY)

    def step():
        adam.zero_grad()
        loss_of(problem.closure()).backward()
        for p in problem.params:
            if p.grad is not None and p.grad.is_sparse:   # which Adam refuses
                p.grad = p.grad.to_dense()
        adam.step()

    return step


def _time(problem: Problem, call) -> float:
    """The least ms of a call, each on data of its own."""
    call()
    best, end, calls = float("inf"), time.perf_counter() + SECONDS, 0
    while calls < FEWEST or time.perf_counter() < end:
        problem.next()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        calls += 1
        if calls > 1 and best > 1.0:
            break
    return 1e3 * best
