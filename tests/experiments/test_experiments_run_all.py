"""`pgdfast run all`: every task in turn, what is complete skipped, what fails named, and the report."""

import json

import pytest

from pgdfast_experiments import experiment, mnist, options, records, run_all, tasks
from pgdfast_experiments.cli import main
from pgdfast_experiments.errors import UsageError, WriteError

TINY = ("--optimizers", "sgd", "--steps", "3", "--seeds", "1")
SMALL = {
    "regression-1d": ("regression-1d", *TINY, "--width", "4"),
    "regression-2d": ("regression-2d", *TINY, "--width", "4"),
    "modular-mlp": ("modular-mlp", *TINY, "--alphas", "0.5"),
}


@pytest.fixture
def ran(monkeypatch):
    """Tiny commands in the place of `tasks.ALL`; returns the names of the tasks that run, as they do."""
    monkeypatch.setattr(tasks, "ALL", dict(SMALL))
    names, run = [], experiment.run

    def noted(task, arguments):
        names.append(task.NAME)
        return run(task, arguments)

    monkeypatch.setattr(experiment, "run", noted)
    return names


def _all(folder, *more):
    return main(["run", "all", "--out", str(folder), *more])


def test_all_means_every_task_by_the_name_of_its_results():
    assert {command[0] for command in tasks.ALL.values()} == set(tasks.TASKS)
    for name, command in tasks.ALL.items():
        task = tasks.load(command[0])
        settings = options.fill(task, options.task_parser(task).parse_args(command[1:]))
        assert experiment.result_name(task, settings) == name
    assert mnist.paper(settings) == mnist.PAPER_CE, "the last is the cross-entropy variant"


def test_every_task_runs_in_order_and_a_report_follows(tmp_path, ran, capsys):
    assert _all(tmp_path) == 0
    out = capsys.readouterr().out
    assert ran == list(SMALL)
    assert [line for line in out.splitlines() if " of 3: " in line] == [
        "1 of 3: regression-1d", "2 of 3: regression-2d", "3 of 3: modular-mlp"]
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 3


def test_resume_skips_what_is_complete_with_the_same_settings(tmp_path, ran, capsys):
    assert _all(tmp_path) == 0
    ran.clear()
    assert _all(tmp_path, "--resume") == 0
    assert ran == []
    assert "2 of 3: regression-2d is complete" in capsys.readouterr().out

    tasks.ALL["regression-2d"] = (*SMALL["regression-2d"], "--lr", "0.5")   # other settings
    (tmp_path / "modular-mlp.png").unlink()                                 # not all of its files
    assert _all(tmp_path, "--resume") == 0
    assert ran == ["regression-2d", "modular-mlp"]

    ran.clear()
    (tmp_path / "regression-1d.json").write_text("{")
    assert _all(tmp_path, "--resume", "--threads", "2") == 0, "threads are a setting"
    assert ran == list(SMALL)
    ran.clear()
    assert _all(tmp_path, "--threads", "2") == 0, "without --resume all run again"
    assert ran == list(SMALL)


def test_settings_compare_as_they_read_from_json():
    assert records.as_read({1: (0.5, 1), "a": None, "x": float("inf")}) == {"1": [0.5, 1], "a": None, "x": None}


def test_an_interrupted_run_of_all_goes_on_where_it_stopped(tmp_path, ran, monkeypatch):
    train, calls = experiment.train, []

    def dying(case, *rest):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(case, *rest)

    tasks.ALL["regression-1d"] = ("regression-1d", *TINY[:1], "sgd,adam", *TINY[2:], "--width", "4")
    monkeypatch.setattr("pgdfast_experiments.checkpoints.Checkpoint.keep", lambda self, state: self.write(state()))
    monkeypatch.setattr(experiment, "train", dying)
    assert _all(tmp_path) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["regression-1d.checkpoint"]
    assert _all(tmp_path, "--resume") == 0
    assert ran == ["regression-1d", *SMALL]
    assert [json.loads((tmp_path / f"{name}.json").read_text())["resumed"] for name in SMALL] == [True, False, False]


@pytest.mark.parametrize(("error", "said"), [
    (UsageError("no files\nhere"), "pgdfast run all: regression-2d: no files here\n"),
    (WriteError("disk full"), "pgdfast run all: regression-2d: disk full\n"),
    (RuntimeError("a fault"), "RuntimeError: a fault\n"),
])
def test_a_task_that_fails_is_named_and_the_others_go_on(tmp_path, ran, monkeypatch, capsys, error, said):
    def failing(settings):
        raise error

    monkeypatch.setattr("pgdfast_experiments.regression_2d.cases", failing)
    assert _all(tmp_path) == 1
    out, err = capsys.readouterr()
    assert ran == list(SMALL)
    assert said in err and err.endswith("pgdfast run all: 1 of 3 failed: regression-2d\n")
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'report.html'}"
    assert "task-regression-2d" in (tmp_path / "report.html").read_text(), "as not run"


def test_when_every_task_fails_there_is_no_report(tmp_path, ran, monkeypatch, capsys):
    def failing(*_):
        raise UsageError("no")

    monkeypatch.setattr(experiment, "run", failing)
    assert _all(tmp_path) == 1
    assert "3 of 3 failed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_would_fail_every_task_is_refused_before_the_work(tmp_path, ran, monkeypatch, capsys):
    def refuse(*_):
        raise UsageError("--backend native cannot run here")

    (tmp_path / "file").write_text("")
    assert _all(tmp_path / "file") == 2
    monkeypatch.setattr(run_all, "check_backend", refuse)
    assert _all(tmp_path / "new", "--backend", "native") == 2
    assert main(["run", "all", "--steps", "3"]) == 2
    assert ran == [] and capsys.readouterr().err.count("\n") == 3


def test_options_reach_the_tasks_that_know_them(tmp_path):
    given = run_all.options.OneLineParser()
    run_all.add_options(given)
    given = given.parse_args(["--out", str(tmp_path), "--data", "digits", "--quick", "--backend", "torch"])
    with_data = run_all._arguments(mnist, ("--loss", "cross-entropy"), given)
    assert (with_data.data, with_data.loss, with_data.out) == ("digits", "cross-entropy", str(tmp_path))
    assert with_data.quick and not with_data.resume and with_data.backend == "torch" and with_data.threads is None
    assert not hasattr(run_all._arguments(tasks.load("regression-1d"), (), given), "data")
