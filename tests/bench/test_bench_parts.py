"""Batches and ranks in the benchmarks: both sides take the same step, and the model counts what is sent."""

import copy
import json
import sys

import bench_folder
import pytest

import pgdfast
from bench import poisson_2d, ranks, scaling, streaming

MACHINES = (scaling.CORE, scaling.H100)
WORKS = [work for problems in (*scaling.STRONG.values(), *scaling.WEAK.values()) for work in problems[1]]


@pytest.fixture(scope="module")
def measured():
    before = sys.path
    sys.path = [*before, str(bench_folder.FOLDER.parent)]   # for the processes, behind the installed package
    try:
        return {one["problem"]: one for one in ranks.run(["pinn", "regression"], rounds=2, quick=True)}
    finally:
        sys.path = before


@pytest.mark.parametrize("name", ["pinn", "regression"])
def test_ranks_take_the_step_of_one_process(measured, name):
    one = measured[name]
    assert one["apart"] < 1e-9 and one["ranks"] == 2
    assert all(len(one["by_round"][side]) == 2 and min(one["by_round"][side]) > 0 for side in ("alone", "ranks"))
    assert 0 < one["collectives"] < one["ranks_seconds"] and one["phases"]["ranks"]["solve"] > 0
    assert name in next(ranks.lines(one))


@pytest.mark.parametrize(("name", "within"), [("pinn", 0.03), ("regression", 1e-3)])
def test_the_model_counts_the_numbers_that_are_sent(measured, name, within):
    one, factors = measured[name], 0.0
    if name == "pinn":
        net, closure, _ = poisson_2d.problem(poisson_2d.SMALL, 0)
        factors = pgdfast.linearize(closure, net.parameters()).row_layout().packed / one["residuals"]
    work = scaling.Work(
        name, one["solver"], one["residuals"], one["parameters"], 0.0, factors, iterations=one["iterations"]
    )
    assert sum(scaling.sent(work, 2, scaling.CORE).values()) == pytest.approx(one["sent"], rel=within)


def test_a_slow_or_a_wrong_measurement_is_said(measured):
    one = copy.deepcopy(measured["pinn"])
    one["faster"] = 1.7
    assert ranks.verdict(one) == ""
    one["faster"] = 1.5
    assert "at least 1.6" in ranks.verdict(one)
    one["apart"] = float("nan")
    assert "apart" in ranks.verdict(one)


def test_an_unknown_problem_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        ranks.main(["Z"])
    assert stop.value.code == 2 and ", ".join(ranks.PROBLEMS) in capsys.readouterr().err


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_the_model_sends_nothing_alone_and_shares_work_alone(machine):
    for work in WORKS:
        assert sum(scaling.sent(work, 1, machine).values()) == 0 == scaling.seconds(work, 1, machine)["sent"]
        one, many = (scaling.seconds(work, R, machine) for R in (1, 64))
        assert many["shared"] < one["shared"] and many["sent"] > 0
        assert scaling.strong(work, machine, [1]) == [1] == scaling.weak(work, machine, [1])
        assert all(times <= R for R, times in zip(scaling.COUNTS, scaling.strong(work, machine, scaling.COUNTS), strict=True))
        best = scaling.pays_until(work, machine)
        assert best == 1024 or scaling.total(work, 2 * best, machine) > 0.75 * scaling.total(work, best, machine)


def test_programs_are_shared_and_matrices_are_not():
    for work in WORKS:
        one, many = (scaling.memory(work, R, scaling.CORE) for R in (1, 8))
        assert one.keys() == many.keys()
        assert all(many[what] == pytest.approx(one[what] / (8 if what == "programs" else 1)) for what in one)


def test_the_curves_are_drawn_and_told(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert scaling.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("pays until R = ") == sum(len(works) for _, works in scaling.STRONG.values())


@pytest.mark.parametrize("solver", ["primal", "cg", "dual"])
def test_a_streamed_step_is_the_whole_one_whatever_is_kept(solver):
    one = streaming.speed(solver, 60, 4, 1, 25)
    assert one["apart"] < 1e-9 and one["kept"] == 3 and one["reruns"] >= 3
    assert min(one["streamed"], one["whole"], one["remade"]) > 0


def test_memory_and_adam_are_measured_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "in_a_process", lambda part, *options: streaming.memory("primal", 2, 100, 4))
    monkeypatch.setattr(sys, "argv", ["streaming", "adam", "--solver", "primal", "--out", str(tmp_path / "found.json")])
    monkeypatch.setattr(streaming.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(streaming, "adam", lambda seconds, *rest: (7, 1.0 + 0 * seconds))
    streaming.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["primal"]["after"] < found["primal"]["losses"][0] and len(found["primal"]["seconds"]) == 2
    assert found["adam"]["lr 0.01, cosine"] == {"steps": 7, "loss": 1.0} and "times LM's" in capsys.readouterr().out


def test_adam_trains_until_its_seconds_are_over():
    taken, loss = streaming.adam(0.2, 200, 4, 1e-2, True)
    network, _, _, batches = streaming.problem(200, 4)
    assert taken > 1 and loss < streaming.total(network, batches, 200)
