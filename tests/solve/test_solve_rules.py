"""The control of CG: one set of rules in Python and C++, one loop for one system and for many."""

import math
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import mlp, rand, relative

import pgdfast
from pgdfast.kernels import cg_rules, native
from pgdfast.kernels.cg_rules import ENDED, ITERATE
from pgdfast.kernels.protocol import STATUS
from pgdfast.linear import EnsembleLinearizer, Linearizer
from pgdfast.solve import solve_members
from pgdfast.solve.krylov import MANY, ONE, conjugate_gradients

core = native._C


@pytest.mark.skipif(core is None, reason="the C++ core is not built")
def test_the_rules_are_those_of_the_core():
    draw, ends = random.Random(1), set()
    assert core.CG_PHASES[ITERATE] == "iterate" and core.CG_PHASES[ENDED] == "ended"

    def number():
        return draw.choice([0.0, 1.0, draw.random(), 10 ** draw.uniform(-8, 8), math.nan, math.inf])

    for _ in range(4000):
        s = {name: number() for name in core.CG_STATE}
        s |= dict(phase=draw.randrange(4), status=2, iteration=draw.choice([0, 1, 3, 49, 50, 99, 100, 149, 500]),
                  claimed=draw.randrange(2), broken=draw.randrange(2), slot=-1, keep_safe=0, restore_safe=0)
        limit, progress, values = draw.choice([0, 50, 150, 1000]), draw.choice([0.0, 1e-3]), [draw.random() for _ in range(600)]
        told = dict(zip(core.CG_STATE, core.cg_judge(
            [float(s[name]) for name in core.CG_STATE], [float(limit), 1e-6, 0.0, progress, 3.0], values,
        ), strict=True))
        found = ONE.rules.judge(
            s["phase"], s["status"], s["iteration"], s["claimed"] == 1, s["broken"] == 1, s["step"], s["before"], s["norm"],
            s["target"], s["value"], s["recurrence"], s["last_claim"], s["safe"], 0.5 * (s["gain"] + s["slack"]),
        )
        phase, status, iteration, claimed, value, recurrence, last_claim, safe, keeps, restores, restart, goes_on = found
        window = ONE.rules.progress_window(iteration)
        phase, status = ONE.rules.go_on(
            phase, status, goes_on, iteration, window, value, values[max(iteration - window, 0)], progress, limit
        )
        assert (phase, status, iteration) == (told["phase"], told["status"], told["iteration"])
        ours = dict(claimed=float(claimed), value=value, recurrence=recurrence, last_claim=last_claim, safe=safe,
                    keep_safe=float(keeps), restore_safe=float(restores))
        assert str(ours) == str({name: told[name] for name in ours})   # NaN equals NaN in print
        kept = s["phase"] == ITERATE and not s["broken"] and iteration & (iteration - 1) == 0
        assert told["slot"] == ((iteration.bit_length() - 1) % 3 if kept else -1)   # as conjugate_gradients has it
        if phase == ITERATE:
            beta = ONE.rules.direction_factor(restart, s["rz"], s["before"])
            assert str(beta) == str(told["beta"])
        ends.add(STATUS[status] if phase == ENDED else core.CG_PHASES[phase])
    assert ends == {"solved", "max_iterations", "breakdown", "stagnated", "progress", "iterate", "check", "restore"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    pgdfast.CG(12, 1e-14), pgdfast.CG(400, 1e-5), pgdfast.CG(90, 1e-9, progress=1e-3), pgdfast.CG(60, absolute=1e-1),
])
@pytest.mark.parametrize("started", [False, True])
def test_many_systems_are_what_each_is_alone(options, dtype, started):
    """ONE column of the batched loop is the loop for one, in status, count and iterate."""
    U, V = (torch.linalg.qr(rand(40, 40, seed=k))[0] for k in (1, 2))
    J = torch.stack([(U * torch.logspace(0, -k, 40, dtype=torch.float64)) @ V.T for k in (1, 0.5, 0.8, 1.2)]).to(dtype)
    b, inverse = rand(4, 40, seed=3, dtype=dtype), 0.5 + rand(4, 40, seed=4, dtype=dtype).square()
    start = rand(4, 40, seed=5, dtype=dtype) if started else None

    def apply(x):
        return ((J.mT @ (J @ x[:, :, None]))[:, :, 0]) + 0.02 * x

    x, status, iterations, *_ = conjugate_gradients(
        apply, b, lambda r: inverse * r, options, MANY, start, listed=[0, 2, 3]
    )
    assert not x[1].any() and int(iterations[1]) == 0
    for k in (0, 2, 3):
        alone, one, count, *_ = conjugate_gradients(
            lambda y: J[k].T @ (J[k] @ y) + 0.02 * y, b[k], lambda r: inverse[k] * r, options, ONE,  # noqa: B023
            start if start is None else start[k],
        )
        assert STATUS[int(status[k])] == STATUS[one] and abs(int(iterations[k]) - count) <= 2
        few = options.max_iterations == 12   # CG magnifies the last digits of its sums from iteration to iteration
        assert relative(x[k], alone) < (1e-8 if few and dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("kind", [ONE, MANY])
def test_a_model_that_rounding_has_spoilt_is_left_for_the_last_good_check(kind):
    """Products that go wrong after the 60th make the value fall at the next check: back to the iterate of the one before."""
    values, count = torch.logspace(0, 5, 200, dtype=torch.float64), 0
    b = rand(200, seed=1)

    def apply(x):
        nonlocal count
        count += 1
        return values * x if count < 60 or count > 103 else -50 * values * x + 1e3

    found = conjugate_gradients(
        apply, b if kind is ONE else b[None], lambda r: r, pgdfast.CG(500, 1e-12), kind, listed=[0]
    )
    count = 0
    last = conjugate_gradients(lambda x: values * x, b, lambda r: r, pgdfast.CG(50, 1e-12), ONE)
    assert STATUS[int(found[1])] in ("stagnated", "breakdown")
    if STATUS[int(found[1])] == "stagnated":
        assert torch.equal(found[0].reshape(-1), last[0]) or relative(found[0].reshape(-1), last[0]) < 1e-12
        assert float(found[3]) == pytest.approx(last[3], rel=1e-9)


def test_ensembles_that_do_not_separate_take_float64_as_each_would_alone():
    B, x = 3, rand(12, 2, seed=5, dtype=torch.float32)
    W = [rand(B, *shape, seed=1, dtype=torch.float32).requires_grad_() for shape in ((9, 2), (1, 9))]

    def net(V, b=None):
        if b is None:
            return torch.einsum("bnh,boh->bno", torch.tanh(torch.einsum("ni,bhi->bnh", x, V[0])), V[1])
        return torch.tanh(x @ V[0].T) @ V[1].T

    lin = EnsembleLinearizer(W, B, "torch")(lambda: 30 * net(W) - 1)
    assert not lin.separates
    for solver in ("dual", "primal", "cg", "eigh", "auto"):
        found = solve_members(lin, {b: 3e-4 for b in range(B)}, solver=solver, cg=pgdfast.CG(400, 1e-10))
        for b in range(B):
            mine = [w.detach()[b].clone().requires_grad_() for w in W]
            one = pgdfast.linearize(lambda: 30 * net(mine, b) - 1, mine, backend="torch")   # noqa: B023
            alone = pgdfast.solve(one, 3e-4, solver=solver, cg=pgdfast.CG(400, 1e-10))
            assert found[b].status == alone.status and relative(found[b].step, alone.step) < 1e-4
            assert found[b].wide == alone.wide
            assert found[b].reduction(1.0) == pytest.approx(alone.reduction(1.0), rel=1e-5)


def calls_of(work):
    """How many Python functions a call enters, by name."""
    names = []

    def note(frame, event, _):
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return names


def test_a_small_step_is_a_few_calls_into_the_core():
    model, x = mlp(1, 80, 80, 1, dtype=torch.float32), torch.linspace(-1, 1, 100)[:, None]
    y, params = torch.sin(5 * x), list(model.parameters())
    linearizer = Linearizer(params)
    for _ in range(3):
        lin = linearizer.read(F.mse_loss(model(x), y))
        pgdfast.solve(lin, 0.1)
    lin.release()
    result = F.mse_loss(model(x), y)
    reading = calls_of(lambda: linearizer.read(result))
    lin = linearizer.read(result)
    solving = calls_of(lambda: pgdfast.solve(lin, 0.1))
    assert len(reading) <= 12 and len(solving) <= 18, (len(reading), reading, len(solving), solving)


def test_a_matrix_that_is_not_finite_names_the_rows():
    w = torch.tensor([1.0, 0.0, 4.0, 0.0], requires_grad=True)
    for backend in ("native", "torch"):
        lin = pgdfast.linearize(lambda: torch.sqrt(w) - 3, [w], backend=backend)
        for found in (pgdfast.solve(lin, 0.1), pgdfast.solve(lin, [0.1, 1.0], solver="eigh")[1], pgdfast.solve(lin, 0.0)):
            assert (found.status, found.usable) == ("not_finite", False) and not found.step.any()
            assert "rows of 2 of 4 residuals (1, 3)" in found.advice and "raise" not in found.advice
    A = torch.full((3, 2), 1e25)
    v = torch.zeros(2, requires_grad=True)
    found = pgdfast.solve(pgdfast.linearize(lambda: A @ v - 1, [v], backend="torch"), 0.1, solver="primal")
    assert found.usable or "float64" in found.advice   # overflow of J^T J, not of J
    stacked = torch.tensor([[1.0, 4.0], [0.0, 1.0]], requires_grad=True)
    lin = EnsembleLinearizer([stacked], 2)(lambda: torch.sqrt(stacked) - 3)
    for solver in ("dual", "primal", "cg"):
        found = solve_members(lin, {0: 0.1, 1: 0.1}, solver=solver)
        assert found[0].usable and found[1].status == "not_finite" and "rows of 1 of 2 residuals (0)" in found[1].advice


def test_the_module_names_its_rules_once():
    assert {rule.__name__ for rule in cg_rules.RULES} == set(vars(ONE.rules)) == set(vars(MANY.rules))
