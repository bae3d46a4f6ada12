"""An interrupted run goes on where it stopped, on the same trajectory; a checkpoint that does not fit is refused."""

import json

import numpy as np
import pytest
import torch

from pgdfast_experiments import checkpoints
from pgdfast_experiments.cli import main
from pgdfast_experiments.training import Run

ARGV = ["run", "regression-1d", "--optimizers", "sgd,lm-0.5,adam", "--steps", "6", "--seeds", "2", "--width", "5"]


def _numbers(folder):
    lines = (folder / "regression-1d.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]   # without the seconds


@pytest.mark.parametrize("writes", [1, 8, 20, 33])
def test_a_killed_run_resumes_on_the_same_trajectory(tmp_path, monkeypatch, capsys, writes):
    assert main([*ARGV, "--out", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    count, write = 0, checkpoints.Checkpoint.write

    def dying(self, state):
        nonlocal count
        write(self, state)
        count += 1
        if count == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoint, "write", dying)
    monkeypatch.setattr(checkpoints.Checkpoint, "keep", lambda self, state: self.write(state()))
    assert main([*ARGV, "--out", str(killed)]) == 130
    assert [file.name for file in killed.iterdir()] == ["regression-1d.checkpoint"]
    monkeypatch.undo()

    assert main([*ARGV, "--out", str(killed)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*ARGV, "--steps", "7", "--resume", "--out", str(killed)]) == 2
    line = capsys.readouterr().err
    assert "other settings (steps was" in line and "6" in line and "7" in line

    assert main([*ARGV, "--resume", "--out", str(killed)]) == 0
    assert _numbers(killed) == _numbers(tmp_path / "whole")
    assert json.loads((killed / "regression-1d.json").read_text())["resumed"] is True
    assert not (killed / "regression-1d.checkpoint").exists()


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    (tmp_path / "regression-1d.checkpoint").write_bytes(b"PK not a checkpoint")
    assert main([*ARGV, "--resume", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "regression-1d.checkpoint") in err and "cannot be read" in err and err.count("\n") == 1


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert main([*ARGV, "--resume", "--out", str(tmp_path)]) == 0


def test_a_write_happens_once_an_interval(tmp_path):
    kept = checkpoints.Checkpoint(tmp_path / "c", {}, interval=3600.0)
    kept.keep(lambda: pytest.fail("too early"))
    assert not kept.exists
    kept.interval = 0.0
    kept.keep(list)
    assert kept.exists


def test_a_finished_run_reads_back_with_its_outcome(tmp_path):
    outcome = {"solution": torch.linspace(0, 1, 6, dtype=torch.float64).reshape(2, 3)}
    run = Run("lm", "small", 3, np.array([0, 2]), {"error": np.array([1.0, 0.5])}, np.array([0.1, 0.2]), 2, None, outcome)
    kept = checkpoints.Checkpoint(tmp_path / "c", {"seeds": 1})
    kept.finish(run)
    kept.write()
    found = checkpoints.Checkpoint(tmp_path / "c", {"seeds": 1})
    found.load()
    again = found.done(run.key)
    assert again.seconds.tolist() == run.seconds.tolist() and again.columns["error"].tolist() == [1.0, 0.5]
    assert torch.equal(again.outcome["solution"], outcome["solution"])
