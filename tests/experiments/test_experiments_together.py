"""Seeds and alpha sweeps as one ensemble: the numbers of separate runs, members that end, resumption."""

import csv
import json

import numpy as np
import pytest
import torch

import pgdfast
from pgdfast_experiments import checkpoints, mnist_data, options, together
from pgdfast_experiments.cli import main
from pgdfast_experiments.tasks import load
from pgdfast_experiments.training import Case, Member, Session, train

D = ["modular-mlp", "--optimizers", "lm-0.1", "--steps", "3", "--seeds", "2", "--alphas", "0.5,1.5"]
# Optimizers, what else, and how far relative to its largest value a column may be off.
TASKS = {
    "regression-1d": (["--optimizers", "sgd,lm-0.1,gn", "--steps", "25", "--seeds", "3", "--width", "20"], 1e-10),
    "regression-2d": (["--optimizers", "lm-0.5", "--steps", "6", "--seeds", "2", "--width", "12"], 1e-10),
    "modular-mlp": (D[1:], 1e-9),   # CG to 1e-8
    "polynomial": (["--optimizers", "lm-1e-5", "--steps", "4", "--seeds", "2", "--alphas", "0.25,4"], 1e-10),
    # float32
    "mnist": (["--optimizers", "adamw,lm", "--steps", "3", "--seeds", "2", "--alphas", "1,4", "--train-size", "20"], 2e-5),
}


def _rows(folder, task):
    with open(folder / f"{task}.csv", newline="") as file:
        head, *rows = csv.reader(file)
    return head[4:-1], [row[:4] for row in rows], np.array([row[4:-1] for row in rows], dtype=float)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """As many for ensembles on every machine."""
    monkeypatch.setattr(options, "cores", lambda: 2)


@pytest.fixture
def noise_for_digits(monkeypatch):
    """No file is read: random pixels stand for the images."""

    def noise(folder, size, seed):
        generator = torch.Generator().manual_seed(seed)
        images = [torch.rand(n, 784, generator=generator) for n in (size, 30)]
        labels = [torch.arange(len(x)) % 10 for x in images]
        return mnist_data.Data(images[0], labels[0], images[1], labels[1], "noise")

    monkeypatch.setattr(mnist_data, "train_and_test", noise)


@pytest.mark.parametrize("task", TASKS)
def test_members_measure_what_they_would_alone(task, tmp_path, noise_for_digits):
    arguments, allowed = TASKS[task]
    assert main(["run", task, *arguments, "--out", str(tmp_path / "together")]) == 0
    assert main(["run", task, *arguments, "--out", str(tmp_path / "apart"), "--sequential"]) == 0
    names, keys, ours = _rows(tmp_path / "together", task)
    others, same_keys, theirs = _rows(tmp_path / "apart", task)
    assert names == others and keys == same_keys, "the same runs, in the same order, with the same steps"
    lm = np.array([key[0].startswith("lm") for key in keys])
    assert np.array_equal(ours[~lm], theirs[~lm]), "other methods run as ever"
    off = np.abs(ours - theirs).max(0) / np.abs(theirs).max(0).clip(1e-300)
    assert off.max() < allowed, dict(zip(names, off, strict=True))
    records = [json.loads((tmp_path / name / f"{task}.json").read_text()) for name in ("together", "apart")]
    lms = {key[0] for key in keys if key[0].startswith("lm")}
    seeds_and_scales = {tuple(key[1:3]) for key in keys if key[0] in lms}
    assert records[0]["ensembles"]["networks"] == dict.fromkeys(lms, len(seeds_and_scales)) and records[1]["ensembles"] is None
    assert records[0]["settings"] == records[1]["settings"] and all(value > 0 for value in records[0]["step_ms"].values())
    assert any("in one ensemble" in note for note in records[0]["table"]["notes"])


def _numbers(folder):
    return _rows(folder, "modular-mlp")[2].tolist()


@pytest.mark.parametrize("writes", [2, 4])
def test_a_killed_ensemble_resumes_on_the_same_trajectory_and_one_by_one(tmp_path, monkeypatch, writes):
    assert main(["run", *D, "--out", str(tmp_path / "whole")]) == 0
    count, write = 0, checkpoints.Checkpoint.write

    def dying(self, states=()):
        nonlocal count
        write(self, states)
        count += 1
        if count == writes:
            raise KeyboardInterrupt

    for mode in ([], ["--sequential"]):
        killed, count = tmp_path / f"killed{mode}", 0
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.Checkpoint, "write", dying)
            patch.setattr(checkpoints.Checkpoint, "keep", lambda self, states: self.write(states()))
            assert main(["run", *D, "--out", str(killed)]) == 130
        assert len(torch.load(killed / "modular-mlp.checkpoint", weights_only=True)["current"]) == (4 if writes == 2 else 3)
        assert main(["run", *D, *mode, "--resume", "--out", str(killed)]) == 0
        if mode:
            np.testing.assert_allclose(_numbers(killed), _numbers(tmp_path / "whole"), rtol=1e-9)
        else:
            assert _numbers(killed) == _numbers(tmp_path / "whole")


def _case(seed, steps=6, ends=None, breaks=None):
    """A line through three points; `ends`: the step after which it is done, `breaks`: that whose loss is not finite."""
    def start():
        generator = torch.Generator().manual_seed(seed)
        model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2, generator=generator, dtype=torch.float64))
        x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        number = 0

        def data(step):
            nonlocal number
            number = step
            return x * (float("nan") if step == breaks else 1.0), x.sum(1, keepdim=True)

        member = Member(lambda network, x, y: network(x) - y, data,
                        lambda params, **more: pgdfast.LM(params, lr=0.5, damping=0.1, damping_rule="delayed", **more))
        optimizer, closure = member.alone(model)
        return Session(model, optimizer, closure, lambda: (float(model.weight.detach().sum()), number), ("w", "step"),
                       np.arange(steps + 1), lambda row: row["step"] == ends, member=member)

    return Case("lm", "", seed, steps, start, together=True)


def test_a_member_that_ends_leaves_the_others_as_they_were():
    cases = [_case(0), _case(1, ends=2), _case(2, breaks=4)]
    expected = [together.train_together([case, _case(9)])[0] for case in cases]
    runs, states, left, seen = [], None, cases, []
    for size in (3, 2):
        ended, states = together.train_together(left, states, seen.append)
        assert len(left) == size and len(ended) == 1
        left = [case for case in left if case.key != ended[0].key]
        runs += ended
    assert [run.seed for run in runs] == [1, 2] and [run.last for run in runs] == [2, 3]
    assert [run.stopped_at for run in runs] == [None, 3] and seen == [3, 3, 2, 1]
    assert [len(state["seconds"]) for state in states] == [4]
    for run in runs:
        alone = next(other for pair in expected for other in pair if other.seed == run.seed)
        assert run.columns["w"].tolist() == alone.columns["w"].tolist() or np.allclose(
            run.columns["w"], alone.columns["w"], rtol=1e-13, equal_nan=True)


def test_a_member_goes_on_alone_with_its_damping():
    whole = train(_case(0), _case(0).start())
    pair = [_case(0), _case(1, ends=3)]
    _, (state,) = together.train_together(pair)
    assert state["optimizer"]["state"][0]["members"][0]["damping"] != 0.1, "the rule has moved mu"
    run = train(pair[0], pair[0].start(), state)
    np.testing.assert_allclose(run.columns["w"], whole.columns["w"], rtol=1e-12)


def test_the_reference_has_no_ensembles(tmp_path):
    arguments = ["--optimizers", "lm-0.5", "--steps", "2", "--seeds", "2", "--width", "4", "--backend", "reference"]
    assert main(["run", "regression-1d", *arguments, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "regression-1d.json").read_text())["ensembles"] is None


def test_help_says_what_sequential_does(capsys):
    with pytest.raises(SystemExit):
        options.task_parser(load("modular-mlp")).parse_args(["--help"])
    assert "--sequential" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        options.task_parser(load("transformer")).parse_args(["--help"])
    assert "--sequential" not in capsys.readouterr().out
