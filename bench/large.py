"""Exact steps of some 10,000 residuals and 100,000 parameters: memory and speed. `python bench/large.py [NAME [DTYPE [M]]]`.

Each problem runs in a process of its own, one thread. Printed: the resident memory at its peak (the whole process, PyTorch
included), what of it the closure with its tape took, what `auto` predicts for the dual solve, processor seconds of the solve,
and its operations (the Gram matrix's half and M^3/3) per second. J alone would take 8 GB in float64.
"""

import subprocess
import sys
from time import process_time

import torch
from torch import nn

import pgdfast
from pgdfast.solve.choice import predicted_costs
from pgdfast.solve.problem import Problem


def mlp(*widths, dtype):
    torch.manual_seed(0)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*[layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())][:-1]).to(dtype)


def regression(M, dtype):
    """tanh 10-300-300-1: weights used once, as factors."""
    net, x = mlp(10, 300, 300, 1, dtype=dtype), torch.randn(M, 10, dtype=dtype)
    return net, lambda: net(x)


def outputs(M, dtype):
    """tanh 10-300-300-10: ten residuals a row."""
    net, x = mlp(10, 300, 300, 10, dtype=dtype), torch.randn(M // 10, 10, dtype=dtype)
    return net, lambda: net(x)


def pinn(M, dtype):
    """tanh 2-310-310-1, its Laplacian by pgdfast.pde, and boundary rows: weights used up to five times."""
    net, inner = mlp(2, 310, 310, 1, dtype=dtype), 9 * M // 10
    x, edge = torch.rand(inner, 2, dtype=dtype), torch.rand(M - inner, 2, dtype=dtype)
    return net, lambda: (pgdfast.pde.laplacian(net, x).laplacian + 1, net(edge))


def sequences(M, dtype):
    """tanh 10-300-300-1 on four tokens, averaged: explicit rows of J."""
    net, x = mlp(10, 300, 300, 1, dtype=dtype), torch.randn(M, 4, 10, dtype=dtype)
    return net, lambda: net(x).mean(1)


PROBLEMS = {make.__name__: make for make in (regression, outputs, pinn, sequences)}


def resident():
    """Bytes that were resident at most."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def one(name, dtype, M):
    torch.set_num_threads(1)
    net, closure = PROBLEMS[name](M, getattr(torch, dtype))
    lin = pgdfast.linearize(closure, net.parameters())
    M, tape, rows = lin.num_residuals, resident(), lin.row_layout()
    predicted = predicted_costs(Problem.of(lin, 0.1), pgdfast.CG())["dual"][1]
    start = process_time()
    solution = pgdfast.solve(lin, 0.1, solver="dual")
    seconds = process_time() - start
    rate = (rows.flops + M**3 / 3) / seconds / 1e9
    print(f"{name:11} {dtype:8} {M:6} {lin.num_parameters:7}  {resident() / 1e9:5.2f} {tape / 1e9:5.2f} "
          f"{predicted / 1e9:9.2f}  {seconds:7.1f} {rate:7.1f}  {solution.status}", flush=True)


def main():
    if len(sys.argv) == 4:
        one(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        return
    print(f"{'problem':11} {'dtype':8} {'M':>6} {'P':>7}  {'GB':>5} {'tape':>5} {'predicted':>9}  {'seconds':>7} "
          "GFLOP/s")
    for name in sys.argv[1:2] or PROBLEMS:
        for dtype in sys.argv[2:3] or ("float64", "float32"):
            subprocess.run([sys.executable, __file__, name, dtype, "10000"], check=True)


if __name__ == "__main__":
    main()
