"""Killed runs, full disks and two runs in one folder: one sentence, nothing lost, and --resume goes on bit for bit."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgdfast_experiments import bench, cli, experiment, locks, plotting, records, regression_1d, run_all
from pgdfast_experiments.cli import main
from pgdfast_experiments.errors import UsageError, WriteError

fcntl = pytest.importorskip("fcntl")

TASK = "regression-1d"
ARGV = ["run", TASK, "--optimizers", "sgd,lm-0.5,adam", "--steps", "6", "--seeds", "2", "--width", "5", "--threads", "1"]
EARLIER = [*ARGV, "--steps", "5"]
KILLED = ("first step", "half the first checkpoint", "half a later checkpoint", "checkpoint not yet in place",
          "between two checkpoints", "pictures", "results not yet in place", "some results in place", "results in place")
FULL = ("full at the start", "full at the first checkpoint", "full at a later checkpoint", "full at the numbers",
        "full at the record", "full at the pictures", "full at the page")
RESULTS = [f"{TASK}.csv", f"{TASK}.json", f"{TASK}.png"]


@contextlib.contextmanager
def _plain_pictures():
    """Pictures that take no time, as those of interrupted_runs.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression_1d, "pictures", lambda *_: {"": (None, "nothing to see")})
        patch.setattr(plotting, "save", lambda figure, path: Path(path).write_bytes(bytes(1000)))
        yield


@pytest.fixture(autouse=True)
def plain_pictures():
    with _plain_pictures():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folders by moment, each with the results of a finished run and what a run that ended at that moment left; `whole`."""
    top = tmp_path_factory.mktemp("interrupted")
    with _plain_pictures():
        assert main([*ARGV, "--out", str(top / "whole")]) == 0
        assert main([*EARLIER, "--out", str(top / "earlier")]) == 0
    plan = []
    for moment in (*KILLED, *FULL):
        folder = top / moment.replace(" ", "-")
        folder.mkdir()
        for name in RESULTS:
            (folder / name).write_bytes((top / "earlier" / name).read_bytes())
        if moment == FULL[-1]:
            (folder / "report.html").write_text("an earlier page")
        plan.append([moment, ["report", str(folder)] if moment == FULL[-1] else [*ARGV, "--out", str(folder)]])
    script = Path(__file__).with_name("interrupted_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(plan)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ended = {moment: json.loads(line) for (moment, _), line in zip(plan, lines, strict=True)}
    return top, ended


def _numbers(folder):
    lines = (folder / f"{TASK}.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]   # without the seconds


def _names(folder):
    return sorted(file.name for file in folder.iterdir())


def _unchanged(base, folder):
    return [name for name in RESULTS if (folder / name).read_bytes() == (base / "earlier" / name).read_bytes()]


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_loses_nothing_and_goes_on_bit_for_bit(base, moment, capsys):
    base, ended = base
    folder = base / moment.replace(" ", "-")
    assert ended[moment][0] == -signal.SIGKILL
    if moment == "some results in place":
        json.loads((folder / f"{TASK}.json").read_text())
        assert _numbers(folder) == _numbers(base / "whole"), "a whole file, earlier or new"
    elif moment != "results in place":
        assert _unchanged(base, folder) == RESULTS

    started = not (folder / f"{TASK}.checkpoint").exists()
    assert started == (moment in ("first step", "half the first checkpoint"))
    assert main([*ARGV, "--resume", "--out", str(folder)]) == 0
    assert ("starts from the beginning" in capsys.readouterr().out) == started
    assert _numbers(folder) == _numbers(base / "whole")
    assert json.loads((folder / f"{TASK}.json").read_text())["resumed"] is not started
    assert _names(folder) == RESULTS, "no lock, no checkpoint, no half-written file"


@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(base, moment, capsys):
    base, ended = base
    folder = base / moment.replace(" ", "-")
    code, said = ended[moment][0], ended[moment][1].strip()   # a progress bar that vanishes leaves an empty line
    assert code == 1 and "could not write" in said and os.strerror(errno.EFBIG) in said, said
    assert len(said.split("\n")) == 1 and str(folder) in said
    assert _unchanged(base, folder) == RESULTS
    later = [f"{TASK}.checkpoint"] if moment in FULL[2:6] else ["report.html"] if moment == FULL[-1] else []
    assert _names(folder) == sorted([*RESULTS, *later])
    assert ("--resume" in said) == (moment in FULL[2:6])
    if moment == FULL[-1]:
        assert (folder / "report.html").read_text() == "an earlier page"
        return
    assert main([*ARGV, "--resume", "--out", str(folder)]) == 0
    assert _numbers(folder) == _numbers(base / "whole") and _names(folder) == RESULTS


def test_moving_the_results_is_undone_where_it_fails_half_way(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("before")
    replace = os.replace

    def failing(source, target):
        if Path(target).name == "z.json" and Path(source).parent.name != ".before":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for links in (True, False):   # or a file system without them
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links")))
        with pytest.raises(WriteError, match="No space left"), records.all_or_nothing(tmp_path) as scratch:
            for name in ("a.csv", "b.png", "z.json"):
                (scratch / name).write_text("after")
        assert _names(tmp_path) == ["a.csv"] and (tmp_path / "a.csv").read_text() == "before"


def test_a_write_that_is_interrupted_leaves_the_old_file_alone(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.write_whole(tmp_path / "a", b"new")
    assert _names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


HOLD = """
import sys, time
from pgdfast_experiments import locks
with locks.only_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def _python(code, *given):
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    with child:
        try:
            yield child
        finally:
            child.kill()


def test_the_second_run_in_a_folder_ends_at_once_and_a_killed_one_leaves_it_free(base, tmp_path, capsys):
    base, _ = base
    for name in RESULTS:
        (tmp_path / name).write_bytes((base / "whole" / name).read_bytes())
    with _python(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        for argv in (ARGV, [*ARGV, "--resume"], ["run", "all"]):
            started = time.monotonic()
            assert main([*argv, "--out", str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and str(tmp_path) in said and f"process {holder.pid} on " in said, said
            assert "wait until it ends" in said and time.monotonic() - started < 5
        assert main(["report", str(tmp_path)]) == 0, "readers are not hindered"
        assert _names(tmp_path) == sorted([locks.NAME, *RESULTS, "report.html"])
        holder.kill()
        holder.wait()
    assert (tmp_path / locks.NAME).exists(), "what a killed process leaves is no lock"
    assert main([*ARGV, "--out", str(tmp_path)]) == 0
    assert _names(tmp_path) == sorted([*RESULTS, "report.html"])


COUNT = """
import sys, time
from pathlib import Path
from pgdfast_experiments import locks
from pgdfast_experiments.errors import UsageError
count, turns = Path(sys.argv[1], "count"), 0
while turns < 200:
    try:
        with locks.only_run(sys.argv[1]):
            count.write_text(str(int(count.read_text()) + 1))
            turns += 1
    except UsageError:
        time.sleep(1e-4)
"""


def test_never_do_two_processes_hold_a_folder(tmp_path):
    (tmp_path / "count").write_text("0")
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_python(COUNT, tmp_path)) for _ in range(3)]
        assert [child.wait(timeout=120) for child in children] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "600" and _names(tmp_path) == ["count"]


def test_locks_nest_in_a_process_and_are_released_by_errors(tmp_path, monkeypatch):
    with pytest.raises(KeyError), locks.only_run(tmp_path), locks.only_run(tmp_path / "."):
        raise KeyError
    assert not _names(tmp_path) and not locks._held
    seen = []
    monkeypatch.setattr(run_all, "check_backend", lambda *_: seen.extend(_names(tmp_path)))
    monkeypatch.setattr(experiment, "run", lambda *_: (_ for _ in ()).throw(UsageError("no")))
    assert main(["run", "all", "--out", str(tmp_path)]) == 1
    assert seen == [locks.NAME], "all of its tasks run under one lock"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_without_locks_a_note_is_given_and_the_run_goes_on(tmp_path, monkeypatch, capsys, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locks.only_run(tmp_path):
        assert not _names(tmp_path)
    assert "no locks in the folder" in capsys.readouterr().err


def test_a_lock_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.os, "write", full)
    with pytest.raises(WriteError, match="No space left"), locks.only_run(tmp_path):
        pytest.fail("it holds no lock")
    assert not _names(tmp_path)


def test_resuming_a_finished_run_says_what_it_does(base, tmp_path, monkeypatch, capsys):
    base, _ = base
    for name in RESULTS:
        (tmp_path / name).write_bytes((base / "whole" / name).read_bytes())
    resume = [*ARGV, "--resume", "--out", str(tmp_path)]
    trained, train = [], experiment._train
    monkeypatch.setattr(experiment, "_train", lambda *given: trained.append(1) or train(*given))
    assert main(resume) == 0
    assert "is complete" in capsys.readouterr().out and not trained
    (tmp_path / f"{TASK}.png").unlink()
    assert main(resume) == 0
    assert "lacks some of its files" in capsys.readouterr().out and len(trained) == 1
    assert main([*resume, "--steps", "7"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert "starts from the beginning" in said and "steps was 6, is 7" in said and "leaves no checkpoint" in said
    assert len(trained) == 2 and len(_numbers(tmp_path)) == 1 + 6 * 8


def test_killed_benchmarks_end_in_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")
    (tmp_path / "bench" / "__main__.py").write_text("import os; os.kill(os.getpid(), 9)\n")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(bench, "find", lambda _: tmp_path)
    assert cli.main(["bench", "--quick", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "signal 9" in said and str(tmp_path / "out") in said
