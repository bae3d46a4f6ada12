"""The memory that `auto` predicts, and what it leaves out for it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import mlp, rand

import pgdfast
from pgdfast.solve.choice import choose

CHOICE = choose.__globals__


def test_reason_names_what_was_left_out_for_memory(monkeypatch):
    model = mlp(2, 3, 1)
    x = rand(400, 2, seed=1)
    lin = pgdfast.linearize(lambda: model(x), model.parameters())
    names = CHOICE
    needed = names["predicted_bytes"](names["Problem"].of(lin, 0.1, None), pgdfast.CG())
    assert needed["cg"] < needed["dual"]
    monkeypatch.setitem(names, "memory_limit", lambda: 0.5 * (needed["dual"] + needed["primal"]))
    assert "dual (0.0 GB) left out for memory" in pgdfast.solve(lin, 0.1).reason
    for limit in (needed["cg"], 0.0):
        monkeypatch.setitem(names, "memory_limit", lambda: limit)  # noqa: B023
        solution = pgdfast.solve(lin, 0.1)
        assert solution.solver == "cg" and "dual (0.0 GB) and primal (0.0 GB) left out" in solution.reason


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters of memory")
@pytest.mark.parametrize("case", ["dual", "dual in passes", "cg"])
def test_predicted_memory_is_within_a_factor_of_two(case, tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_of_solve.py")), case],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,   # away from the source folder, which has no core
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "solved"
    assert 0.5 < found["predicted"] / found["measured"] < 2, found
    if case == "dual in passes":
        assert found["measured"] < 144e6, "explicit rows of all parameters at once"


def test_predicted_operations_count_the_sketch():
    model = mlp(2, 30, 30, 1)
    x = rand(400, 2, seed=1)
    names = CHOICE
    problem = names["Problem"].of(pgdfast.linearize(lambda: model(x), model.parameters()), 0.1, None)
    rank, P = 30, problem.linearization.num_parameters

    def operations(**options):
        return names["predicted_costs"](problem, pgdfast.CG(100, **options))["cg"][0]

    plain = operations()
    often, seldom = (operations(preconditioner=pgdfast.Nystrom(rank, refresh)) for refresh in (1, 10))
    applied = 4 * rank * P * 100
    assert seldom - plain > applied and often - plain - applied == pytest.approx(10 * (seldom - plain - applied))


@pytest.mark.parametrize("M, P, taken", [(8000, 90000, "dual"), (9000, 8000, "dual"), (20000, 50000, "cg")])
def test_cg_need_not_be_three_times_cheaper_where_neither_size_is_small(M, P, taken, monkeypatch):
    names = CHOICE
    costs = {"dual": (2e12, 1e9), "primal": (9e12, 1e9), "cg": (1e12, 1e6), "eigh": (9e13, 1e9)}
    monkeypatch.setitem(names, "predicted_costs", lambda *_: costs)
    monkeypatch.setitem(names, "memory_limit", lambda: 8e9)
    problem = SimpleNamespace(mu=0.1, penalty=None, linearization=SimpleNamespace(num_residuals=M, num_parameters=P))
    name, why = names["choose"](problem, "auto", pgdfast.CG())
    assert name == taken and f"M = {M}, P = {P}" in why
