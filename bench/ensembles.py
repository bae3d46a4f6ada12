"""Ensembles against their members trained one by one: the same steps from the same parameters, checked against each other."""

import copy

import torch

import pgdfast
from pgdfast_experiments import modular_mlp, regression_1d
from pgdfast_experiments.models import tanh_mlp

from .interleave import Row, interleaved
from .parts import SINGLES
from .peers import LM
from .tables import Measured

RULE, RULE_SINGLES = "LM step, gain-ratio", "LM step, gain-ratio, one by one"
COUNT = 64
ALPHAS, SEEDS, QUICK_SEEDS = (0.5, 0.71, 1.0, 1.22, 1.5, 2.0), 5, 2
WARM_UP = 2   # steps that D's networks have taken: CG's iterations grow at first
PAPER = {"damping": 0.1, "damping_rule": "constant", "lr": 1e-2}
SWEEP = {"damping": 0.1, "damping_rule": "constant", "cg": pgdfast.CG(2000, 1e-8)}


class Singles:
    """The members with an optimizer each; a call takes a step with each, from the parameters after `warm_up` steps."""

    def __init__(self, members, closures, options, warm_up=0):
        self.members, self.closures = members, closures
        self.optimizers = [pgdfast.LM(member.parameters(), **options) for member in members]
        for _ in range(warm_up):
            for optimizer, closure in zip(self.optimizers, closures, strict=True):
                optimizer.step(closure)
        self.start = [_Start(optimizer) for optimizer in self.optimizers]

    def __call__(self):
        for start, optimizer, closure in zip(self.start, self.optimizers, self.closures, strict=True):
            start.restore()
            optimizer.step(closure)

    def moved(self):
        """Every member's parameters after a call less those before, (B, P)."""
        self()
        return torch.stack([torch.cat([part.flatten() for part in start.moved()]) for start in self.start])


class Together:
    """The same as one ensemble. closure: function of its networks, returning (B, ...)."""

    def __init__(self, members, closure, options, warm_up=0):
        networks = pgdfast.functional_ensemble(members)
        self.optimizer = pgdfast.LM(networks.parameters(), ensemble=len(members), **options)
        self.closure = lambda: closure(networks)
        for _ in range(warm_up):
            self.optimizer.step(self.closure)
        self.start = _Start(self.optimizer)

    def __call__(self):
        self.start.restore()
        self.optimizer.step(self.closure)

    def moved(self):
        """As of Singles."""
        self()
        return torch.cat([part.flatten(1) for part in self.start.moved()], 1)


class _Start:
    """An optimizer's parameters, and what it remembers, to return to."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.values = [p.detach().clone() for p in self.parameters]
        self.memory = copy.deepcopy([optimizer.state.get(p) for p in self.parameters])

    @torch.no_grad()
    def restore(self):
        for p, value, memory in zip(self.parameters, self.values, self.memory, strict=True):
            p.copy_(value)
            if memory is None:
                self.optimizer.state.pop(p, None)
            else:
                self.optimizer.state[p] = {name: copy.copy(known) for name, known in memory.items()}

    def moved(self):
        return [p.detach() - value for p, value in zip(self.parameters, self.values, strict=True)]


def regression(options):
    """(Singles, Together) of 64 networks of task A, 1-80-80-1 on 100 points, float64, that differ in seed."""
    x, u = regression_1d.data()
    members = [tanh_mlp(1, 80, 2, 1, seed) for seed in range(COUNT)]
    together = Together(members, lambda networks: networks(x) - u, options)
    return Singles(members, [lambda member=member: member(x) - u for member in members], options), together


def sweep(seeds):
    """(Singles, Together) of D's sweep over alpha and seeds, CG to 1e-8, after WARM_UP steps."""
    members, data = [], []
    for seed in range(seeds):
        (x, y), _ = modular_mlp.data(seed)
        for alpha in ALPHAS:
            members.append(modular_mlp.QuadraticNetwork(modular_mlp.MODULUS, modular_mlp.WIDTH, alpha**2, seed, torch.float64))
            data.append((x, y))
    x, y = map(torch.stack, zip(*data, strict=True))
    closures = [lambda member=member, x=x, y=y: member(x) - y for member, (x, y) in zip(members, data, strict=True)]
    together = Together(members, lambda networks: networks(x, each=True) - y, SWEEP, WARM_UP)
    return Singles(members, closures, SWEEP, WARM_UP), together


def measure_regression(rounds, quick=False):
    """One step of every network, by the paper's plain LM and by the default rule."""
    (apart, together), (rule_apart, rule_together) = regression(PAPER), regression({})
    errors = {LM.name: (_error(together, apart), 1e-9), RULE: (_error(rule_together, rule_apart), 1e-7)}
    rows = [Row(LM.name, together), Row(SINGLES, apart), Row(RULE, rule_together), Row(RULE_SINGLES, rule_apart)]
    return _measured(f"{COUNT} networks of A, one step of each, float64", rows, rounds, errors, apart)


def measure_sweep(rounds, quick=False):
    """One step, the third, of every network of D's sweep."""
    seeds = QUICK_SEEDS if quick else SEEDS
    apart, together = sweep(seeds)
    errors = {LM.name: (_error(together, apart), 1e-7)}
    title = f"D's sweep of {len(ALPHAS)} alphas and {seeds} seeds, step {WARM_UP + 1} of each, float64"
    return _measured(title, [Row(LM.name, together), Row(SINGLES, apart)], rounds, errors, apart)


def _measured(title, rows, rounds, errors, apart):
    facts = {"networks": len(apart.members), "parameters": sum(p.numel() for p in apart.members[0].parameters())}
    return Measured(title, interleaved(rows, rounds, 20.0), errors=errors, facts=facts)


def _error(together, apart):
    """The largest relative distance of a member's step from the step that it takes alone."""
    ours, theirs = together.moved(), apart.moved()
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


SECTIONS = {"64 of A": measure_regression, "D's sweep": measure_sweep}
