"""`python -m bench`: what it measures is judged, written and told by its exit code. Sections here are fakes but for one row."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import bench_folder
import pytest

import pgdfast
from bench import __main__ as command
from bench import bounds, interleave, measure, parts, peers, peers_jax, plots, problems, products, sections, tables
from pgdfast_experiments import bench


def measured(errors=None, **medians):
    timings = {name: interleave.Timing(interleave.Row(name, None), {1: {1: value}}) for name, value in medians.items()}
    return tables.Measured("a title", timings, errors=errors or {}, ours=next(iter(medians), "none"))


def faster(limit):
    return bounds.Bound("fake", "a over b", (bounds.Side(lambda m: m.ratio("a", "b"), limit),))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Function of the sections {name: function of the run}, returning (exit code, results.json or None, stdout, stderr)."""

    def run(fakes, *options):
        monkeypatch.setattr(sections, "SECTIONS", fakes)
        monkeypatch.setattr(bench, "SECTIONS", tuple(fakes))
        code = command.main(["--output", str(tmp_path), *options])
        path = tmp_path / "results.json"
        return code, json.loads(path.read_text()) if path.exists() else None, *capsys.readouterr()

    return run


def section(make, *judged):
    return lambda run: run.measured(run.results.problems, "fake", make, judged)


def test_what_holds_is_exit_code_0(run):
    code, results, out, _ = run({"fake": section(lambda: measured(a=1.0, b=2.0, errors={"a": (1e-7, 1e-6)}), faster(0.5))})
    assert code == 0 and results["faults"] == []
    assert [row["verdict"] for row in results["bounds"]] == ["pass"]
    row = results["problems"]["fake"]["rows"]["b"]
    assert (row["median_ms"], row["over_ours"], row["seconds"]) == (2000.0, 2.0, {"1": [2.0]})
    assert (results["rounds"], results["quick"]) == (bench.ROUNDS, False)
    assert "a title" in out and "failed" not in out


def test_a_bound_that_is_missed_is_exit_code_1_and_one_sentence(run):
    code, results, out, _ = run({"fake": section(lambda: measured(a=1.0, b=2.0), faster(0.4))}, "--quick")
    assert code == 1 and results["quick"] and results["rounds"] == bench.QUICK_ROUNDS
    assert "fake: a over b must be <= 0.4, and is 0.5." in out


@pytest.mark.parametrize("error", [2e-6, float("nan")])
def test_a_wrong_result_is_exit_code_1(run, error):
    code, results, out, _ = run({"fake": section(lambda: measured(a=1.0, errors={"a": (error, 1e-6)}))})
    (fault,) = results["faults"]
    assert code == 1 and fault.startswith("a is off by") and "1.0e-06" in fault and fault in out


def test_what_cannot_be_measured_is_exit_code_1_and_the_rest_goes_on(run):
    def broken():
        raise ArithmeticError("no step")

    code, results, _, err = run({
        "broken": lambda run: run.measured(run.results.problems, "broken", broken, [faster(1)]),
        "fake": section(lambda: measured(a=1.0, b=2.0), faster(0.5)),
    })
    assert code == 1 and results["faults"] == ["broken could not be measured: ArithmeticError('no step')."]
    assert "Traceback" in err and list(results["problems"]) == ["fake"]


def test_a_warning_of_ours_spoils_a_measurement_and_a_peers_does_not(run):
    def warn(text):
        warnings.warn(text, stacklevel=1)
        return measured(a=1.0)

    assert run({"fake": section(lambda: warn("a peer's"))})[0] == 0
    assert run({"fake": section(lambda: warn("pgdfast: a fallback"))})[0] == 1


def test_a_bound_on_what_is_missing_is_skipped_with_the_reason(run):
    code, results, _, _ = run({"fake": section(lambda: measured(a=1.0), faster(0.5))})
    assert code == 0 and [row["verdict"] for row in results["bounds"]] == ["skipped: b was not timed"]


def test_an_interrupted_run_writes_what_it_has(run):
    def interrupted(run):
        raise KeyboardInterrupt

    code, results, _, err = run({"fake": section(lambda: measured(a=1.0)), "slow": interrupted})
    assert code == 130 and list(results["problems"]) == ["fake"] and "interrupted" in err


def test_named_sections_run_alone_and_once(run):
    ran = []
    fakes = {name: lambda run, name=name: ran.append(name) for name in "ABC"}
    assert run(fakes, "C", "A", "C")[0] == 0 and ran == ["C", "A"]


def test_an_unknown_section_and_a_missing_core_are_exit_code_2(run, monkeypatch):
    code, results, _, err = run({"A": pytest.fail}, "Z")
    assert (code, results) == (2, None) and err.startswith("python -m bench: unknown problem 'Z'") and err.count("\n") == 1
    monkeypatch.setattr(pgdfast, "backends", lambda: {"native": "not built"})
    code, results, _, err = run({"A": pytest.fail})
    assert (code, results) == (2, None) and "not built" in err and err.count("\n") == 1


def test_results_that_cannot_be_written_are_exit_code_1_and_leave_the_earlier_ones(run, monkeypatch):
    assert run({"fake": section(lambda: measured(a=1.0))})[0] == 0

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.os, "replace", full)
    code, results, _, err = run({"fake": section(lambda: measured(b=1.0))})
    assert code == 1 and "No space left" in err and list(results["problems"]["fake"]["rows"]) == ["a"]


def test_every_section_that_the_command_names_is_there():
    assert tuple(sections.SECTIONS) == bench.SECTIONS


def test_the_pictures_know_the_rows_by_their_names():
    rows = {kind.name for kind in (peers.LM, peers.Adam, peers.TorchFunc, peers_jax.Jax, peers_jax.JaxProduct,
                                   products.TorchFuncProduct, products.CompiledCurvlinops)}
    assert set(plots.NAMES) == rows | {parts.GGN, parts.CHOLESKY, parts.GEMMS}


def test_memory_bounds_take_what_the_probe_prints():
    probed = {"problem": "G", "baseline": 100e6, "heaps": [10, 500, 500, 500 + 2048], "peaks": [100e6, 140e6, 141e6, 141e6],
              "after_import": 90e6}
    verdicts = {row["claim"]: row for row in (bound.judge(probed) for bound in bounds.memory_bounds("G", 2000, 200_000))}
    assert [row["measured"] for row in verdicts.values()] == ["40.0 MB", "140 MB", "1.0 MB", "2 KiB"]
    assert {row["verdict"] for row in verdicts.values()} == {"pass"}
    (above,) = bounds.memory_bounds("E", 550, 100_000)
    assert above.judge(probed)["verdict"] == "FAIL"
    with pytest.raises(bounds.Absent, match="reset its peak"):
        above.judge({**probed, "baseline": None})


def test_no_row_of_a_problem_is_timed_twice_or_missed():
    """A small B in one round, peers as they are installed: every row is timed or says why not, and is checked."""
    small = problems.Regression("B", "tanh 2-20-20-1", (2, 20, 20, 1), 60, 1e-2)
    found = measure.measure(small, 1, quick=True)
    wanted = [kind.name for kind in measure.on(small, measure.CONTENDERS + measure.PRODUCTS, True)]
    assert {*found.timings, *found.missing} == {*wanted, *parts.names(small)} and not set(found.timings) & set(found.missing)
    for row in (peers.LM.name, parts.GGN):
        error, allowed = found.errors[row]
        assert error <= allowed
    assert all(timing.median > 0 for timing in found.timings.values())


def test_the_installed_package_is_timed_not_the_source_folder(tmp_path):
    """`-m` puts the current folder first on sys.path, and its pgdfast may have no core."""
    for name in ("bench", "pgdfast", "installed/pgdfast"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
    source = (bench_folder.FOLDER / "__main__.py").read_text()
    (tmp_path / "bench" / "__main__.py").write_text(source[:source.index("if __name__")] + (
        "_prefer_the_installed_package()\nimport pgdfast\nprint(pgdfast.__file__)\n"))

    def timed(path):
        done = subprocess.run([sys.executable, "-S", "-m", "bench"], cwd=tmp_path, env={"PYTHONPATH": path},
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip()).parent

    assert timed(str(tmp_path / "installed")) == tmp_path / "installed" / "pgdfast"
    assert timed("") == tmp_path / "pgdfast"
