"""bench/gpu.py without a GPU: what it says, and that a part that fails or hangs does not stop the others."""

import sys

import bench_folder  # noqa: F401
import pytest
import torch

from bench import gpu as bench_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(capsys, tmp_path):
    assert bench_gpu.main(["--out", str(tmp_path / "found.json")]) == 2
    assert "PyTorch sees no GPU on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_parts_that_fail_are_told_by_their_last_words():
    assert bench_gpu.run([sys.executable, "-c", "print('well')"], 30)["status"] == "done"
    failed = bench_gpu.run([sys.executable, "-c", "raise ValueError('no good')"], 30)
    assert failed["status"] == "failed: exit code 1" and "no good" in failed["message"]
    assert bench_gpu.run(["/no/such/program"], 30)["status"].startswith("failed: [Errno 2]")
    slow = bench_gpu.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2)
    assert slow["status"] == "failed: not done within 2 seconds" and "begun" in slow["message"]


@pytest.mark.parametrize("name", ["check", "products", "cg"])
def test_parts_run_at_tiny_sizes_on_the_cpu(name):
    from bench import gpu_parts

    before = torch.get_rng_state()
    try:
        assert gpu_parts.PARTS[name]("cpu", True)
    finally:
        torch.set_rng_state(before)


def test_the_plan_names_every_part_and_stays_within_its_limits(tmp_path):
    names = [name for name, *_ in bench_gpu.plan("cuda", tmp_path)]
    assert names[-10:] == ["tests", "verify", "check", "steps", "ensemble", "gram", "products", "cg", "memcheck", "racecheck"]
