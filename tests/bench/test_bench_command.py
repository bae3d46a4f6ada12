"""`pgdfast bench`: what it refuses, what it runs, and its exit codes; nothing is timed here."""

import sys

import pytest

from pgdfast_experiments import bench
from pgdfast_experiments.cli import main


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree with an empty bench folder, and a folder deep in it as the current one."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """What would have been run: a list of (command, folder); `waits` holds what each wait for it ends in."""

    class Calls(list):
        waits = (0,)

    found = Calls()

    class Process:
        returncode = None

        def __init__(self, command, cwd):
            found.append((command, cwd))
            self._waits = iter(found.waits)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            ending = next(self._waits)
            if isinstance(ending, type):
                raise ending
            self.returncode = ending
            return ending

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    return found


def refused(capsys, argv):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("pgdfast bench: ") and err.count("\n") == 1
    return err


def test_an_unknown_problem_is_refused_with_those_there_are(capsys, tree, calls):
    line = refused(capsys, ["bench", "A", "Z"])
    assert "'Z'" in line and all(name in line for name in bench.SECTIONS) and not calls


@pytest.mark.parametrize("rounds", ["0", "few"])
def test_rounds_are_whole_numbers_from_one_up(capsys, tree, calls, rounds):
    assert repr(rounds) in refused(capsys, ["bench", "--rounds", rounds]) and not calls


def test_without_a_source_tree_one_sentence(capsys, tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, ["bench"])
    assert str(tmp_path) in line and "source tree" in line and not calls


def test_a_missing_package_is_one_sentence(capsys, tree, calls, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else True)
    line = refused(capsys, ["bench"])
    assert "matplotlib" in line and "pip install 'pgdfast[bench]'" in line and not calls


def test_a_folder_that_cannot_be_written_is_refused(capsys, tree, calls):
    line = refused(capsys, ["bench", "--output", str(tree / "pyproject.toml")])
    assert "--output" in line and not calls


@pytest.mark.parametrize(("waits", "code"), [((0,), 0), ((1,), 1), ((KeyboardInterrupt, 130), 130)])
def test_the_exit_code_is_that_of_the_benchmarks_which_ctrl_c_reaches_by_itself(tree, calls, waits, code):
    calls.waits = waits
    assert main(["bench"]) == code and len(calls) == 1


@pytest.mark.parametrize(("given", "rounds"), [
    ([], "40"), (["--quick"], "6"), (["--rounds", "3"], "3"), (["--quick", "--rounds", "3"], "3"),
])
def test_it_runs_the_bench_folder_of_the_tree(tree, calls, given, rounds):
    assert main(["bench", *given, "--output", "out", "A", "sweeps"]) == 0
    ((command, folder),) = calls
    assert folder == tree and (tree / "deep" / "er" / "out").is_dir()
    assert command == [sys.executable, "-m", "bench", "--output", str(tree / "deep" / "er" / "out"), "--rounds", rounds,
                       *given[:"--quick" in given], "A", "sweeps"]


@pytest.mark.parametrize("given", [["closures", "--only", "pinn", "--no-time"], ["globalization", "--only", "A"]])
def test_other_studies_have_options_of_their_own(tree, calls, given):
    assert main(["bench", *given]) == 0
    ((command, folder),) = calls
    assert folder == tree and command == [sys.executable, "-m", "bench", *given]
