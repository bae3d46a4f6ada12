"""The data of `regression-1d`, its verdicts on made-up curves, and a short run from end to end."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pgdfast_experiments import regression_1d as task
from pgdfast_experiments.cli import main
from pgdfast_experiments.measures import FAIL, OPEN, PASS, fourier_amplitudes
from pgdfast_experiments.training import Run


def test_the_target_is_fourier_modes_3_5_7_of_amplitudes_one_two_three_thirds():
    x, u = task.data()
    assert x.shape == u.shape == (100, 1) and x.dtype is u.dtype is torch.float64
    measured = fourier_amplitudes(u[:, 0].numpy(), range(50))
    expected = np.zeros(50)
    expected[[3, 5, 7]] = [1 / 3, 2 / 3, 1]
    np.testing.assert_allclose(measured, expected, atol=1e-14)


def test_the_grid_is_one_period_without_its_right_end():
    x, _ = task.data()
    assert x[0] == -1 and x[-1] == pytest.approx(0.98)
    torch.testing.assert_close(x.diff(dim=0), torch.full((99, 1), 0.02, dtype=torch.float64))


def test_the_target_is_the_formula():
    x, u = task.data()
    for j in (0, 17, 99):
        t = x[j].item()
        value = sum(k * math.sin((2 * k + 1) * math.pi * t - k) for k in (1, 2, 3)) / 3
        assert u[j].item() == pytest.approx(value, abs=1e-15)


def _exponential(optimizer, factor, seeds=3, steps=400):
    """Return runs whose modes all fall by `factor` (a number, or one per mode) per 100 steps."""
    step = np.arange(steps + 1)
    factors = np.broadcast_to(factor, len(task.MODES))
    columns = {f"mode_{k}": f ** (step / 100) for k, f in zip(task.MODES, factors, strict=True)}
    columns["loss"] = columns["mode_7"] ** 2
    return [Run(optimizer, "", seed, step, dict(columns), np.full(steps, 1e-3), steps) for seed in range(seeds)]


def _outcomes(*groups, steps=400, lr=1e-2):
    settings = SimpleNamespace(steps=steps, lr=lr)
    summary = task.summarize([run for group in groups for run in group], settings)
    return [check.outcome for check in task.judge(summary, settings)]


def test_curves_as_the_theory_has_them_pass():
    assert _outcomes(_exponential("sgd", 0.99), _exponential("lm-0.5", 0.7),
                     _exponential("lm-0.1", 0.5), _exponential("gn", 0.366)) == [PASS] * 5


@pytest.mark.parametrize("factor", [0.33, 0.40, 1.0])
def test_a_gauss_newton_mode_outside_the_band_is_not_reproduced(factor):
    factors = [0.366] * 9 + [factor]
    assert _outcomes(_exponential("gn", factors))[0] == FAIL


def test_a_gauss_newton_mode_at_the_rounding_floor_does_not_count():
    runs = _exponential("gn", 0.366)
    for run in runs:
        run.columns["mode_9"] = np.full(401, 1e-16)
    assert _outcomes(runs)[0] == PASS


def test_lm_slower_than_sgd_or_faster_than_gauss_newton_is_not_reproduced():
    def outcome(lm):
        return _outcomes(_exponential("sgd", 0.99), _exponential("lm-0.5", lm),
                         _exponential("gn", 0.366))[1]

    assert (outcome(0.6), outcome(1.1), outcome(0.2)) == (PASS, FAIL, FAIL)


def test_lm_that_is_slower_at_smaller_mu_is_not_reproduced():
    assert _outcomes(_exponential("lm-0.5", 0.5), _exponential("lm-0.1", 0.7))[2] == FAIL


def test_a_higher_loss_of_lm_than_of_sgd_is_not_reproduced():
    assert _outcomes(_exponential("sgd", 0.6), _exponential("lm-0.5", 0.7),
                     _exponential("gn", 0.366))[3] == FAIL


def test_sgd_that_does_not_stall_is_not_reproduced():
    assert _outcomes(_exponential("sgd", 0.5))[4] == FAIL


def test_what_was_not_run_or_ran_too_briefly_is_not_judged():
    assert _outcomes(_exponential("sgd", 0.99)) == [OPEN] * 4 + [PASS]
    assert set(_outcomes(_exponential("gn", 0.366, steps=50), steps=50)) == {OPEN}


def test_a_short_run_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "made" / "here"
    names = ["sgd", "lm-0.5", "gn", "adam"]
    code = main(["run", "regression-1d", "--optimizers", ",".join(names), "--steps", "4", "--seeds",
                 "2", "--width", "12", "--out", str(out)])
    printed = capsys.readouterr().out
    assert code == 0
    assert sorted(f.name for f in out.iterdir()) == [f"regression-1d.{e}" for e in
                                                     ("csv", "json", "png")]
    assert "Gauss-Newton" in printed and "not judged" in printed

    with open(out / "regression-1d.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["optimizer", "variant", "seed", "step", "loss",
                             *(f"mode_{k}" for k in range(1, 11)), "seconds"]
    assert [(r["optimizer"], r["seed"], r["step"]) for r in rows] == [
        (name, str(seed), str(step)) for seed in range(2) for name in names for step in range(5)]
    starts = {(r["seed"], r["loss"]) for r in rows if r["step"] == "0"}
    assert len(starts) == 2, "every optimizer starts from the seed's own weights"

    record = json.loads((out / "regression-1d.json").read_text())
    assert record["seeds"] == [0, 1]
    assert record["settings"]["steps"] == dict.fromkeys(names, 4) and record["settings"]["width"] == 12
    assert record["settings"]["optimizers"] == names
    assert record["settings"]["lr"] == dict.fromkeys(names, 0.01)
    assert [figure["file"] for figure in record["figures"]] == ["regression-1d.png"]
    assert record["table"]["rows"] and record["paper"] and set(record["step_ms"]) == set(names)
    assert set(record["versions"]) == {"pgdfast", "torch", "numpy", "python"}
    assert record["summary"]["adam_step_ms"] > 0

    assert (out / "regression-1d.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_two_runs_agree_to_the_last_digit_but_for_the_clock(tmp_path):
    def numbers(folder):
        main(["run", "regression-1d", "--optimizers", "lm-0.1", "--steps", "3", "--seeds", "1",
              "--width", "8", "--hidden-layers", "1", "--out", str(folder)])
        lines = (folder / "regression-1d.csv").read_text().splitlines()
        return [line.rpartition(",")[0] for line in lines]

    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_the_backends_agree_with_the_reference(tmp_path):
    def modes(backend):
        main(["run", "regression-1d", "--optimizers", "lm-0.5", "--steps", "5", "--seeds", "1",
              "--width", "10", "--backend", backend, "--out", str(tmp_path / backend)])
        with open(tmp_path / backend / "regression-1d.csv", newline="") as file:
            return [[float(row[f"mode_{k}"]) for k in task.MODES] for row in csv.DictReader(file)]

    np.testing.assert_allclose(modes("auto"), modes("reference"), rtol=1e-8)


def test_a_diverging_run_is_drawn_and_said(tmp_path, capsys):
    code = main(["run", "regression-1d", "--optimizers", "sgd", "--lr", "1e6", "--steps", "300",
                 "--seeds", "1", "--width", "8", "--out", str(tmp_path)])
    assert code == 0
    assert "no longer finite" in capsys.readouterr().out
    record = json.loads((tmp_path / "regression-1d.json").read_text())
    assert record["summary"]["sgd"]["stopped_at"]["0"] > 0
    assert record["summary"]["sgd"]["final_loss"] is None
