"""The study of globalization: verdict and profile on made-up runs, one tiny problem end to end, interruptions."""

import json
import math

import bench_folder  # noqa: F401 - makes `bench` importable
import pytest
import torch

import pgdfast
from bench.globalization import command, profile, runner, tables, verdict
from bench.globalization.problems import PROBLEMS, Problem
from bench.globalization.variants import DEFAULT, FIXED, TODAY, VARIANTS

ONE, OTHER = list(FIXED)[:2]


def record(variant, early, deep, seed=0):
    """A made-up run; None for a target that was not reached."""
    def reached(seconds):
        return seconds and {"steps": 10 * seconds, "solves": 10, "trials": 10, "seconds": seconds}

    return {"variant": variant, "seed": seed, "options": VARIANTS[variant], "repeatable": True, "seconds": 1.0,
            "early": reached(early), "deep": reached(deep)}


def runs(**times):
    """{problem: records} from problem={variant: (early, deep)}."""
    return {name: [record(v, *pair) for v, pair in row.items()] for name, row in times.items()}


GOOD = runs(A={ONE: (1, 4), OTHER: (2, 2), TODAY: (2, 8), DEFAULT: (1.2, 2)},
            B={ONE: (None, None), OTHER: (1, None), TODAY: (1, None), DEFAULT: (0.5, None)})


def test_bounds_that_are_met():
    judged = verdict.judged(verdict.comparisons(GOOD))
    assert [met for _, met in judged] == [True] * 4
    assert f"worst: 1.20 on A, early (best: {ONE})" in judged[0][0]
    assert f"of 3 targets: {(1.2 * 1.0 * 0.5) ** (1 / 3):.2f}" in judged[1][0]
    assert "default: none" in judged[2][0] and "worst: 0.60 on A, early" in judged[3][0]


@pytest.mark.parametrize(("default", "missed"), [
    ((1.4, 2.0), [0, 1]), ((1.2, 2.5), [1]), ((1.2, None), [1, 2, 3]), ((1.0, 9.5), [0, 1, 3]), ((1.0, 2.0), []),
])
def test_bounds_that_are_missed(default, missed):
    made = runs(A={ONE: (1, 4), OTHER: (2, 2), TODAY: (2, 8), DEFAULT: default})
    judged = verdict.judged(verdict.comparisons(made))
    assert [k for k, (_, met) in enumerate(judged) if not met] == missed


def test_median_over_seeds_counts_what_was_not_reached_as_longest():
    records = [record(DEFAULT, early, None, seed) for seed, early in enumerate((3, None, 1))]
    cell = verdict.cells(records, "early")[DEFAULT]
    assert (cell.seconds, cell.reached, cell.seeds) == (3, 2, 3)
    assert not verdict.cells(records, "deep")[DEFAULT].solved
    records = [record(DEFAULT, early, None, seed) for seed, early in enumerate((None, None, 1))]
    assert verdict.cells(records, "early")[DEFAULT].seconds == math.inf


def test_variants_are_compared_on_the_seeds_that_all_have():
    records = [record(ONE, 1, 1, 0), record(ONE, 9, 9, 1), record(ONE, 9, 9, 2), record(DEFAULT, 1, 1, 0)]
    assert verdict.cells(records, "early")[ONE].seconds == 1


def test_profile_is_the_share_within_a_factor_of_the_best():
    ratios = verdict.profile(GOOD, "early")
    assert ratios[ONE] == [1, math.inf] and ratios[DEFAULT] == [1.2, 1]
    assert [verdict.share(ratios[DEFAULT], tau) for tau in (1, 1.2, 100)] == [0.5, 1, 1]
    assert verdict.share(ratios[ONE], 100) == 0.5
    assert verdict.profile(GOOD, "deep")[OTHER] == [1]   # B: nobody got there, so it counts for nobody


def test_page_and_picture(tmp_path):
    page = tables.page(GOOD, 7)
    assert "| A (1) | 1 (1.00), 10 steps | 2 (2.00), 20 steps | 2 (2.00), 20 steps | 1.2 (1.20), 12 steps |" in page
    assert "| B (1) | - | 1 (1.00), 10 steps |" in page and ": met" in page and "7 s in steps" in page
    profile.draw(tmp_path / "profile.png", GOOD)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_fixed_combinations_are_those_that_lm_accepts():
    assert {"gain-ratio", "gain-ratio + chord", "delayed + geodesic", "sweep"} <= set(FIXED)
    assert "sweep + chord" not in FIXED and not any("constant" in v or "auto" in v for v in FIXED)


def line(seed):
    """Fit a e^x + tanh b to x, a tiny problem; the least loss is 7.84e-3."""
    params = [torch.nn.Parameter(torch.full((2,), float(seed), dtype=torch.float64))]
    x = torch.linspace(0, 1, 7, dtype=torch.float64)
    return params, lambda: params[0][0] * x.exp() + params[0][1].tanh() - x, None


TINY = Problem("a line", line, 2e-2, 7.9e-3, 20, 5.0, 2)


def test_warm_up_leaves_no_trace():
    warm, cold = runner.Trainer(TINY, ONE, 0), runner.Trainer(TINY, ONE, 0)
    warm.warm_up()
    assert all(a["loss"] == b["loss"] and a["curve"][1] == b["curve"][1] for a, b in [(warm.train(), cold.train())])
    assert torch.equal(warm.params[0], cold.params[0])


def test_curve_keeps_both_ends():
    seconds, values = runner.thinned(list(range(1000)), list(range(1000)))
    assert values[0] == 0 and values[-1] == 999 and len(values) <= runner.CURVE and seconds == values


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "tiny", TINY)
    threads = torch.get_num_threads()
    yield ["--only", "tiny", "--variants", f"{ONE},{DEFAULT}"]
    torch.set_num_threads(threads)


def test_command_runs_resumes_and_runs_anew(tiny, tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(command, "run", lambda *given: ran.append(given[1:3]) or runner.run(*given))
    argv = [*tiny, "--output", str(tmp_path / "out")]
    every = [(v, seed) for seed in (0, 1) for v in (ONE, DEFAULT)]
    assert command.main(argv) == 0 and ran == every
    assert {p.name for p in (tmp_path / "out").iterdir()} == {command.JSON, command.PAGE, command.PICTURE}
    first = json.loads((tmp_path / "out" / command.JSON).read_text())["runs"]["tiny"]
    assert all(r["deep"]["seconds"] >= r["early"]["seconds"] > 0 and r["repeatable"] for r in first)
    ran.clear()
    monkeypatch.setattr(profile, "draw", lambda path, runs: None)   # half a second each
    assert command.main(argv) == 0 and ran == []
    assert json.loads((tmp_path / "out" / command.JSON).read_text())["runs"]["tiny"] == first
    assert command.main([*argv, "--fresh-variant", DEFAULT, "--repeats", "9"]) == 0 and ran == every[1::2]
    again = json.loads((tmp_path / "out" / command.JSON).read_text())["runs"]["tiny"]
    assert [r["repeated"] for r in again] == [7, 9, 7, 9]
    ran.clear()
    monkeypatch.setitem(PROBLEMS, "tiny", Problem("a line", line, 2e-2, 1e-30, 20, 5.0, 1))
    assert command.main([*argv, "--seeds", "1"]) == 0 and ran == every[:2], "other targets are other runs"
    assert "met" in capsys.readouterr().out


def test_interrupted_study_keeps_what_is_finished(tiny, tmp_path, monkeypatch):
    ran = []

    def interrupt(*given):
        ran.append(given[1:3])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return runner.run(*given)

    monkeypatch.setattr(command, "run", interrupt)
    monkeypatch.setattr(profile, "draw", lambda path, runs: None)
    argv = [*tiny, "--seeds", "1", "--output", str(tmp_path)]
    assert command.main(argv) == 130
    monkeypatch.setattr(command, "run", runner.run)
    assert command.main(argv) == 0
    assert len(json.loads((tmp_path / command.JSON).read_text())["runs"]["tiny"]) == 2


@pytest.mark.parametrize("argv", [["--only", "Z"], ["--variants", "nonsense"], ["--seeds", "0"]])
def test_wrong_values_are_refused(argv, tmp_path, capsys):
    assert command.main([*argv, "--output", str(tmp_path)]) == 2
    assert "needed" in capsys.readouterr().err


def test_another_file_is_not_taken_for_a_record(tiny, tmp_path, capsys):
    (tmp_path / command.JSON).write_text("{}")
    assert command.main([*tiny, "--output", str(tmp_path)]) == 2 and "--output" in capsys.readouterr().err


def test_every_problem_can_be_stepped():
    """The cheap ones at least, and that every one can be made; their targets are in order."""
    for name, problem in PROBLEMS.items():
        assert 0 <= problem.deep < problem.early, name
        if problem.quick:
            module, closure, _ = problem.make(0)
            pgdfast.LM(module.parameters() if isinstance(module, torch.nn.Module) else module, **problem.options).step(closure)
