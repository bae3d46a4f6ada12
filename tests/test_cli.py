"""The command line: help, versions, and one line on stderr for everything that cannot be run."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pgdfast_experiments import tasks, terminal
from pgdfast_experiments.cli import main

TASK = "regression-1d"
TINY = ["run", TASK, "--optimizers", "sgd", "--steps", "2", "--seeds", "1", "--width", "4"]


def _refused(capsys, argv):
    """Run `argv`, which has to be refused, and return the line it says."""
    code = main(argv)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    return err.rstrip("\n")


@pytest.mark.parametrize(("options", "got", "needed"), [
    (["--steps", "0"], "--steps: got '0'", "1 or more"),
    (["--steps", "1.5"], "--steps: got '1.5'", "whole number"),
    (["--seeds", "-1"], "--seeds: got '-1'", "1 or more"),
    (["--seeds", "x"], "--seeds: got 'x'", "whole number"),
    (["--hidden-layers", "0"], "--hidden-layers: got '0'", "1 or more"),
    (["--width", "no"], "--width: got 'no'", "whole number"),
    (["--threads", "0"], "--threads: got '0'", "1 or more"),
    (["--lr", "0"], "--lr: got '0'", "above 0"),
    (["--lr", "nan"], "--lr: got 'nan'", "above 0"),
    (["--lr", "fast"], "--lr: got 'fast'", "above 0"),
    (["--optimizers", "sgd,lbfgs"], "got 'lbfgs'", "lm-MU"),
    (["--optimizers", "lm--1"], "got 'lm--1'", "lm-MU"),
    (["--optimizers", ""], "got ''", "lm-MU"),
    (["--optimizers", "gn,gn"], "'gn' twice", "once"),
    (["--backend", "abacus"], "abacus", "native"),
    (["--depth", "3"], "--depth", "--help"),
    (["--step", "3"], "--step", "--help"),
    (["--steps"], "--steps", "expected one argument"),
    (["extra"], "extra", "--help"),
])
def test_a_bad_value_is_one_line_of_what_was_given_and_what_is_needed(capsys, options, got, needed):
    line = _refused(capsys, ["run", TASK, *options])
    assert line.startswith("pgdfast run: ")
    assert got in line and needed in line


@pytest.mark.parametrize("argv", [["run"], ["run", "regression-9d"], ["run", "--steps", "3", TASK]])
def test_without_a_known_task_the_tasks_are_listed(capsys, argv):
    line = _refused(capsys, argv)
    assert line.startswith("pgdfast run: ")
    assert all(name in line for name in tasks.TASKS)


@pytest.mark.parametrize("argv", [[], ["jump"], ["--steps"]])
def test_without_a_known_command_one_line(capsys, argv):
    assert _refused(capsys, argv).startswith("pgdfast: ")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("pgdfast_experiments.experiment.train", pytest.fail)
    (tmp_path / "file").write_text("")
    line = _refused(capsys, [*TINY, "--out", str(tmp_path / "file")])
    assert "--out" in line and str(tmp_path / "file") in line


def test_a_backend_that_cannot_run_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    def build(*_, **__):
        raise RuntimeError("pgdfast.LM: no such backend\nin this build")

    monkeypatch.setattr("pgdfast_experiments.methods.pgdfast.LM", build)
    line = _refused(capsys, ["run", TASK, "--optimizers", "gn", "--backend", "native",
                             "--out", str(tmp_path)])
    assert "--backend native" in line and "no such backend in this build" in line


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_a_missing_extra_is_one_sentence(capsys, tmp_path, monkeypatch, missing):
    find = terminal.importlib.util.find_spec
    monkeypatch.setattr(terminal.importlib.util, "find_spec",
                        lambda name: None if name == missing else find(name))
    line = _refused(capsys, [*TINY, "--out", str(tmp_path / "new")])
    assert missing in line and 'pip install "pgdfast[run]"' in line
    assert not (tmp_path / "new").exists()


def test_a_report_without_jinja2_is_refused_in_one_sentence(capsys, tmp_path, monkeypatch):
    find = terminal.importlib.util.find_spec
    monkeypatch.setattr(terminal.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    line = _refused(capsys, ["report", str(tmp_path)])
    assert "jinja2 missing" in line and 'pip install "pgdfast[run]"' in line
    line = _refused(capsys, ["run", "all", "--out", str(tmp_path / "new")])   # which ends in a report, hours later
    assert "jinja2 missing" in line and not (tmp_path / "new").exists()


def test_ctrl_c_ends_with_130_and_no_file(capsys, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pgdfast_experiments.experiment.train", interrupted)
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    assert "pgdfast run: interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_files_are_written_leaves_none(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pgdfast_experiments.regression_1d.pictures", interrupted)
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    assert [file.name for file in tmp_path.iterdir()] == [f"{TASK}.checkpoint"], "the training is kept, and no half result"


def test_results_that_cannot_be_written_are_exit_code_1(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pgdfast_experiments.records.write_json", full)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [f"{TASK}.checkpoint"]


@pytest.mark.parametrize(("argv", "words"), [
    (["--help"], ["run TASK", "run all", "report DIR", "verify"]),
    (["run", "--help"], [TASK, "all "]),
    (["run", "all", "--help"], ["--out", "--quick", "--resume", "--data", "--threads", "--backend"]),
    (["report", "--help"], ["DIR", "--out"]),
    (["run", TASK, "--help"], ["--optimizers", "--steps", "--seeds", "--hidden-layers", "--width",
                               "--lr", "--out", "--backend", "--quick", "--threads"]),
    (["--version"], ["pgdfast "]),
])
def test_help_and_version(capsys, argv, words):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(word in out for word in words)


@pytest.mark.parametrize("argv", [
    ["--help"], ["run", "--help"], ["run", "all", "--help"], ["report", "--help"], ["verify", "--help"], ["bench", "--help"],
    *(["run", name, "--help"] for name in tasks.TASKS),
], ids=" ".join)
def test_help_fits_a_terminal_of_80_columns(capsys, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(argv) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


@pytest.mark.parametrize("argv", [
    ["--help"], ["--version"], ["run", "--help"], ["run", "nothing"], ["report", "--help"], ["bench", "--help"],
], ids=" ".join)
def test_help_and_version_do_not_wait_for_pytorch(tmp_path, argv):
    code = (f"import sys; from pgdfast_experiments.cli import main; main({argv}); "
            "sys.exit(bool({'torch', 'pgdfast', 'matplotlib', 'rich'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, cwd=tmp_path).returncode == 0


def test_quick_gives_way_to_what_is_given():
    from pgdfast_experiments.options import OneLineParser, add_common, fill

    task = SimpleNamespace(NAME=TASK, KNOWN=("sgd", "lm-MU"), RATES={"sgd": 0.1, "lm": 0.5},
                           DEFAULTS={"optimizers": "sgd", "steps": {"sgd": 800, "lm": 9}, "seeds": 5, "threads": 1},
                           QUICK={"steps": 300, "seeds": 2})
    parser = OneLineParser()
    add_common(parser, task)

    def values(*argv):
        filled = fill(task, parser.parse_args(argv))
        method = filled.optimizers[0]
        return filled.steps_of(method), filled.seeds, filled.rate(method)

    assert values() == (800, 5, 0.1)
    assert values("--optimizers", "lm-2") == (9, 5, 0.5)
    assert values("--quick") == (300, 2, 0.1)
    assert values("--quick", "--steps", "9", "--lr", "3") == (9, 2, 3.0)


def test_python_m_pgdfast_is_the_command_and_imports_no_extra(tmp_path):
    code = ("import runpy, sys; sys.argv = ['pgdfast', 'run', 'nothing']\n"
            "try:\n    runpy.run_module('pgdfast', run_name='__main__')\n"
            "except SystemExit as stop:\n    print(stop.code)\n"
            "print([name for name in ('matplotlib', 'rich') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.splitlines() == ["2", "[]"]
    assert done.stderr.startswith("pgdfast run: unknown task 'nothing'")
    assert done.stderr.count("\n") == 1
