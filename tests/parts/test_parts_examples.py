"""The scripts of examples/ and `pgdfast run poisson-2d --nproc 2` run, in two gloo processes where they are for several."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative

import pgdfast
from pgdfast_experiments.cli import main

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the source tree is not here")


def python(folder, *argv):
    """What a command prints, run in a folder, with the package that these tests have."""
    path = os.pathsep.join(filter(None, (str(Path(pgdfast.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=folder, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def parameters_in(path):
    state = torch.load(path, weights_only=True)
    return torch.cat([p.reshape(-1) for p in state["model"].values()])


def test_poisson_on_two_processes_is_poisson_on_one(tmp_path):
    script, small = EXAMPLES / "ddp_poisson.py", ("--points", 120, "--steps", 5)
    both = python(tmp_path, *TORCHRUN, script, *small, "--check", "--save", "two.pt")
    rest = python(tmp_path, script, *small, "--resume", "two.pt", "--save", "last.pt")
    alone = python(tmp_path, script, "--points", 120, "--steps", 10, "--save", "whole.pt")
    losses = [re.findall(r"loss (\S+) ", text) for text in (both, rest, alone)]
    assert losses[0] + losses[1] == losses[2] and len(losses[0]) == 5, "each loss once, and the same"
    apart, = re.findall(r"from one process with all points: (\S+)", both)
    assert float(apart) < 1e-9
    assert relative(parameters_in(tmp_path / "last.pt"), parameters_in(tmp_path / "whole.pt")) < 1e-10


def test_streaming_takes_exact_steps_on_a_loader(tmp_path):
    text = python(tmp_path, EXAMPLES / "streaming.py", "--rows", 1100, "--batch", 300, "--steps", 5)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
    assert len(losses) == 5 and losses[-1] < 0.5 * losses[0] and "Adam" in text


def test_the_command_runs_on_two_processes_and_writes_once(tmp_path):
    options = ("--net", "small", "--derivatives", "pde", "--steps", 6, "--seeds", 1, "--threads", 1)
    text = python(tmp_path, "-m", "pgdfast", "run", "poisson-2d", "--nproc", 2, *options, "--out", "two")
    assert text.count("wrote ") == 3 and text.count("poisson-2d: median") == 1
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [f"poisson-2d.{end}" for end in ("csv", "json", "png")]
    assert main(["run", "poisson-2d", "--optimizers", "lm", *map(str, options), "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "poisson-2d.json").read_text()) for name in ("one", "two"))
    assert (one["problem"]["processes"], two["problem"]["processes"]) == (1, 2) and one["settings"] == two["settings"]
    (name, row), = one["summary"].items()
    for column in ("loss", "error"):
        assert two["summary"][name][column] == pytest.approx(row[column], rel=1e-8)


@pytest.mark.parametrize(("options", "words"), [
    (["--optimizers", "adam,lm"], "is for LM, got 'adam'"), (["--backend", "reference"], "--backend reference"),
    (["--nproc", "0"], "--nproc: got '0'"),
])
def test_what_does_not_run_on_several_processes_is_refused(capsys, tmp_path, options, words):
    assert main(["run", "poisson-2d", "--nproc", "2", "--out", str(tmp_path / "new"), *options]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "new").exists()
