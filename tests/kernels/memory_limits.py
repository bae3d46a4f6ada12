"""A process whose steps run out of memory, once at every limit: run by test_kernels_memory.py.

Arguments: solver:limit each, a limit being bytes of address space beyond what is in use. Prints one line per argument: itself
and "done", or itself, the name of the exception and whether the parameters are unchanged.
"""

import gc
import resource
import sys

import torch
import torch.nn.functional as F

import pgdfast


def problem(rows):
    """A network on one-hot inputs, whose products skip zeros, with several outputs per row."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Tanh(), torch.nn.Linear(256, 3)).double()
    x = F.one_hot(torch.arange(rows) * 7 % 256, 256).double()
    x = torch.cat([x, F.one_hot(torch.arange(rows) * 5 % 256, 256).double()], 1)
    y = torch.randn(rows, 3, dtype=torch.float64)
    params = list(model.parameters())
    return params, lambda: F.mse_loss(model(x), y)


def used():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def attempt(solver, extra):
    params, closure = problem(300)
    before = [p.detach().clone() for p in params]
    optimizer = pgdfast.LM(params, solver=solver, damping=1e-3, cg=pgdfast.CG(30, 1e-12))
    gc.collect()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used() + extra, hard))
    try:
        optimizer.step(closure)
        outcome = "done"
    except Exception as error:
        outcome = f"{type(error).__name__}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    same = all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
    return outcome if outcome == "done" else f"{outcome} {'unchanged' if same else 'CHANGED'}"


if __name__ == "__main__":
    torch.set_num_threads(2)
    cases = [case.split(":") for case in sys.argv[1:]]
    for solver in dict(cases):
        params, closure = problem(90)
        pgdfast.LM(params, solver=solver, damping=1e-3).step(closure)   # threads start, libraries take what they need
    for solver, extra in cases:
        print(f"{solver}:{extra}", attempt(solver, int(extra)), flush=True)
