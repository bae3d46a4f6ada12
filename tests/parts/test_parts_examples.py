"""The scripts of examples/ and `pgdfast run poisson-2d --nproc 2` run, in two gloo processes where they are for several."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative

import pgdfast

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
