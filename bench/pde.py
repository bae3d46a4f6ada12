"""The Laplacian of a network and an LM step on it: pgdfast.pde against nested autograd in the closure."""

import itertools
import math

import torch

import pgdfast

from .interleave import Row, interleaved
from .parts import NESTED, NESTED_STEP, TAYLOR
from .peers import LM
from .tables import Measured

INTERIOR, BOUNDARY = 900, 120
NETWORKS = [(64,), (256,), (64, 64), (128, 128), (256, 256), (64, 64, 48, 48)]
QUICK_NETWORKS = [(64,), (64, 64)]
GRADIENT, NESTED_GRADIENT = f"{TAYLOR}, gradient", f"{NESTED}, gradient"


def nested(net, x):
    """The Laplacian as a script without pgdfast.pde has it, (N, 1)."""
    x = x.detach().requires_grad_()
    slope, = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return sum(torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)[0][:, k : k + 1] for k in range(x.shape[1]))


def taylor(net, x):
    """The same by pgdfast.pde."""
    return pgdfast.pde.laplacian(net, x).laplacian


def title(hidden):
    """The section's name."""
    return f"pde 2-{'-'.join(map(str, hidden))}-1"


def measure(hidden, rounds):
    """All rows of one network in turn: tanh, float64, 900 points within and 120 on the boundary of the unit square."""
    generator = torch.Generator().manual_seed(0)
    x, edge = torch.rand(INTERIOR, 2, generator=generator).double(), torch.rand(BOUNDARY, 2, generator=generator).double()
    f = 2 * math.pi**2 * torch.sin(math.pi * x).prod(1, keepdim=True)
    net = network(hidden)
    errors = {TAYLOR: (_relative(taylor(net, x), nested(net, x)), 1e-12)}
    errors[GRADIENT] = (_relative(*(_gradient(net, x, form) for form in (taylor, nested))), 1e-11)
    steps = {}
    for name, form in ((LM.name, taylor), (NESTED_STEP, nested)):
        model = network(hidden)
        opt = pgdfast.LM(model.parameters(), damping=1e-2, damping_rule="constant")
        start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

        def step(opt=opt, model=model, form=form):
            return opt.step(lambda: ((form(model, x) + f) / INTERIOR**0.5, model(edge) / BOUNDARY**0.5))

        def reset(model=model, start=start):
            torch.nn.utils.vector_to_parameters(start, model.parameters())

        step()
        moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start
        reset()
        steps[name] = moved, Row(name, step, reset)
    errors[LM.name] = (_relative(steps[LM.name][0], steps[NESTED_STEP][0]), 1e-8)
    rows = [
        steps[LM.name][1], steps[NESTED_STEP][1],
        Row(TAYLOR, lambda: taylor(net, x)), Row(NESTED, lambda: nested(net, x)),
        Row(GRADIENT, lambda: _gradient(net, x, taylor)), Row(NESTED_GRADIENT, lambda: _gradient(net, x, nested)),
    ]
    facts = {"residuals": INTERIOR + BOUNDARY, "parameters": sum(p.numel() for p in net.parameters())}
    return Measured(f"{title(hidden)}, {facts['parameters']:,} parameters, float64", interleaved(rows, rounds), errors=errors,
                    facts=facts)


def network(hidden):
    """A tanh network with weights of its own."""
    before = torch.get_rng_state()
    torch.manual_seed(1)
    layers = [torch.nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise((2, *hidden, 1))]
    torch.set_rng_state(before)
    return torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.Tanh())][:-1])


def _gradient(net, x, form):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(form(net, x).square().mean(), list(net.parameters())[:-1])])


def _relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())
