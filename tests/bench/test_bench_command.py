"""`pgdfast bench`: what it refuses, what it runs, and its exit codes; nothing is timed here."""

import json
from pathlib import Path

import pytest

from pgdfast_experiments import bench
from pgdfast_experiments.cli import main


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree with an empty bench folder as the current folder."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "interleave.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """What would have been run: a list of (command, environment); pytest's exit code is its attribute `code`."""

    class Calls(list):
        code, writes, drawn = 0, True, 0

    found = Calls()

    def call(command, cwd, env=None):
        found.append((command, env))
        if env is None:
            return found.drawn
        if found.writes:
            Path(env["PGDFAST_BENCH_OUTPUT"], "results.json").write_text(json.dumps({}))
        return found.code

    monkeypatch.setattr(bench.subprocess, "call", call)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    return found


def refused(capsys, argv, code=2):
    assert main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("pgdfast bench: ") and err.count("\n") == 1
    return err


def test_an_unknown_problem_is_refused_with_those_there_are(capsys, tree, calls):
    line = refused(capsys, ["bench", "A", "Z"])
    assert "'Z'" in line and all(name in line for name in bench.SECTIONS) and not calls


def test_without_a_source_tree_one_sentence(capsys, tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, ["bench"])
    assert str(tmp_path) in line and "source tree" in line and not calls


@pytest.mark.parametrize("missing", ["pytest", "pytest_benchmark", "matplotlib"])
def test_a_missing_package_is_one_sentence(capsys, tree, calls, monkeypatch, missing):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == missing else True)
    line = refused(capsys, ["bench"])
    assert missing.replace("_", "-") in line and "pip install 'pgdfast[bench]'" in line and not calls


def test_a_folder_that_cannot_be_written_is_refused(capsys, tree, calls):
    line = refused(capsys, ["bench", "--output", str(tree / "pyproject.toml")])
    assert "--output" in line and not calls


@pytest.mark.parametrize(("pytests", "ours"), [(0, 0), (1, 1), (2, 130), (3, 1)])
def test_exit_codes(tree, calls, pytests, ours):
    calls.code = pytests
    assert main(["bench", "--output", str(tree / "out")]) == ours


def test_no_results_or_no_pictures_are_exit_code_1(capsys, tree, calls):
    calls.drawn = 1
    assert "could not be drawn" in refused(capsys, ["bench", "--output", "out"], code=1)
    calls.writes = False
    earlier = Path("out", "results.json").read_text()
    assert "before there were results" in refused(capsys, ["bench", "--output", "out"], code=1)
    assert Path("out", "results.json").read_text() == earlier, "an earlier run's results stay"


def test_it_runs_pytest_on_the_bench_folder_and_then_draws(tree, calls, monkeypatch):
    monkeypatch.delenv("PGDFAST_BENCH_ROUNDS", raising=False)
    assert main(["bench", "--quick", "--output", "out", "A", "sweeps"]) == 0
    (timed, env), (drawn, _) = calls
    assert str(tree / "bench") in timed and "--benchmark-only" in timed
    assert (env["PGDFAST_BENCH_ONLY"], env["PGDFAST_BENCH_QUICK"], env["PGDFAST_BENCH_ROUNDS"]) == ("A,sweeps", "1", "6")
    assert env["PGDFAST_BENCH_OUTPUT"] == str(tree / "deep" / "er" / "out")
    assert drawn[1:] == [str(tree / "bench" / "plots.py"), str(tree / "deep" / "er" / "out" / "results.json")]


def test_rounds_that_are_set_outside_stay(tree, calls, monkeypatch):
    monkeypatch.setenv("PGDFAST_BENCH_ROUNDS", "3")
    for quick in ([], ["--quick"]):
        main(["bench", "--output", "out", *quick])
        assert calls[-2][1]["PGDFAST_BENCH_ROUNDS"] == "3"
