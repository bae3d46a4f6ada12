"""`pgdfast verify --device cuda`, as far as a machine without a GPU shows it."""

import pytest
import torch

from pgdfast_experiments import cli, tasks, verification, verify


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_problem_moves_to_another_device(name):
    """The closure runs where no tensor has memory: not one is left behind."""
    for _, make in verify._problems(name, "cpu"):
        problem = verification.on_device(make(torch.float32, 0), "meta")
        with torch.enable_grad():
            result = problem.closure()
        for part in result if isinstance(result, tuple) else (result,):
            assert part.device.type == "meta"


def test_tensors_that_are_one_stay_one():
    x = torch.ones(3, requires_grad=True)
    w = torch.nn.Linear(3, 1)
    pair = (x, torch.zeros(2))

    def inner():
        return x

    def closure():
        return inner() is x is pair[0], pair[1].device, w.weight.device, x.requires_grad

    problem = verification.on_device(verification.Problem(w, closure, {}, (), ""), "meta")
    same, other, weight, grad = problem.closure()
    assert same and grad and other.type == weight.type == "meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cli.main(["verify", "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU; leave it out to compare on the CPU" in capsys.readouterr().err
