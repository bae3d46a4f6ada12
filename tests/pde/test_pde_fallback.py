"""Networks and inputs that Taylor mode does not take: the slower form with a word, or one clear error."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import mlp, rand, relative
from torch import nn

from pgdfast import pde
from pgdfast.pde import jets


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(jets, "_announced", set())


def laplacian_of(net, x):
    """Point by point and output by output."""
    outputs, hessian = net(x).shape[1], torch.autograd.functional.hessian
    return torch.stack([
        torch.stack([hessian(lambda p, o=o: net(p[None])[0, o], point).trace() for o in range(outputs)]) for point in x
    ])


class Odd(nn.Module):
    """Its activation has no rule."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x):
        return torch.atan(self.layer(x))


def test_an_operation_without_a_rule_is_announced_once_by_name():
    net, x = Odd(), rand(7, 2, seed=1)
    with pytest.warns(UserWarning, match="no Taylor rule for atan; this network's derivatives take nested autograd") as seen:
        lap = pde.laplacian(net, x).laplacian
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pde.laplacian(net, x)
    assert relative(lap, laplacian_of(net, x)) < 1e-12


@pytest.mark.parametrize("net", [
    nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
    nn.Sequential(nn.Linear(2, 4), nn.ELU(), nn.Linear(4, 1)),
    nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)),
    nn.Sequential(nn.Linear(2, 4), nn.GELU(approximate="tanh"), nn.Linear(4, 1)),
    nn.Sequential(nn.Linear(2, 4), nn.Softplus(beta=2), nn.Linear(4, 1)),
], ids=lambda net: type(net[1]).__name__)
def test_other_modules_fall_back(net):
    net, x = net.double(), rand(7, 2, seed=1)
    with pytest.warns(UserWarning, match="no Taylor rule for"):
        lap = pde.laplacian(net, x).laplacian
    assert relative(lap, laplacian_of(net, x)) < 1e-10


def test_the_fallback_without_gradients_leaves_no_graph():
    with pytest.warns(UserWarning), torch.no_grad():
        assert not any(part.requires_grad for part in pde.laplacian(Odd(), rand(3, 2)))


def test_a_function_that_ignores_its_inputs():
    constant = torch.ones(4, 1, dtype=torch.float64)
    u, du, lap = pde.laplacian(lambda x: constant, rand(4, 2))
    assert torch.equal(u, constant) and not du.any() and not lap.any() and du.shape == (2, 4, 1)


@pytest.mark.parametrize("call, words", [
    (lambda net, x: pde.laplacian(net, x[:, 0]), r"x is shape \(6,\).*must be a floating-point tensor \(N, d\)"),
    (lambda net, x: pde.laplacian(net, x.long()), "torch.int64"),
    (lambda net, x: pde.laplacian(net, x.tolist()), "x is list"),
    (lambda net, x: pde.laplacian(net, x, coordinates=[2]), r"\[2\] does not name coordinates of points with 2"),
    (lambda net, x: pde.laplacian(net, x, coordinates=[]), "coordinates is empty"),
    (lambda net, x: pde.jet(net, x, []), "directions is empty"),
    (lambda net, x: pde.jet(net, x, ["x"]), "does not name coordinates"),
    (lambda net, x: pde.jet(net, x, torch.ones(2, 3)), r"shape \(2, 3\) for points \(6, 2\)"),
    (lambda net, x: pde.jet(net, x, [0, 1], order=3), "order is 3 for 2 direction"),
    (lambda net, x: pde.jet(net, x, [0, 1], order=[1]), r"order is \[1\] for 2 direction"),
    (lambda net, x: pde.jet(lambda x: net(x)[:, 0], x, [0]), r"the network gave shape \(6,\) for 6 points"),
    (lambda net, x: pde.jet(lambda x: None, x, [0]), "the network gave NoneType"),
])
def test_bad_input_gets_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(mlp(2, 4, 1), rand(6, 2))


def test_another_dtype_gets_pytorch_s_own_message():
    with pytest.raises(RuntimeError, match="dtype"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pde.laplacian(mlp(2, 4, 1, dtype=torch.float32), rand(6, 2))


_SCRIPT = """
import torch, pgdfast
from pgdfast import pde
from pgdfast.pde.nested import nested
torch.manual_seed(0)
for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
    x = torch.rand(37, 2, dtype=dtype)
    linear = torch.nn.Linear
    for activation in (torch.nn.Tanh(), torch.nn.GELU(), torch.nn.Softplus()):
        net = torch.nn.Sequential(linear(2, 19), activation, linear(19, 18), activation, linear(18, 1))
        net = net.to(dtype)
        fast, slow = pde.jet(net, x, [0, 1]), nested(net, x, torch.eye(2, dtype=dtype), ((1.0, 0.0), (0.0, 1.0)))
        for a, b in zip(fast, slow):
            assert float((a - b).detach().norm() / b.detach().norm()) < bound
        a, b = (torch.autograd.grad(jets[2].square().sum(), net[0].weight)[0] for jets in (fast, slow))
        assert float((a - b).norm() / b.norm()) < 100 * bound
print(pgdfast.build_info()["instruction set"])
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"PGDFAST_ISA": name},
    )
    if "which this processor does not run" in done.stderr:
        pytest.skip(f"this processor does not run {name}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name
