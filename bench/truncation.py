"""Rejected CG steps: shortened along CG's path, or solved again at a larger mu. `python bench/truncation.py`.

Full-batch GGN steps under "gain-ratio" from a small damping, both ways from the same weights: solves and CG iterations
spent, losses evaluated, the loss after equal numbers of steps, and the loss once equal numbers of CG iterations are spent.
"""

from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import pgdfast
from pgdfast import backend

STEPS, BUDGET = 12, 1000


def classifier(seed):
    """20-64-64-10 on labels of a random teacher, 512 samples."""
    torch.manual_seed(seed)
    def net():
        return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    x, teacher, model = torch.randn(512, 20), net(), net()
    labels = (3 * teacher(x) + 0.3 * torch.randn(512, 10)).argmax(1)
    return model, lambda: F.cross_entropy(model(x), labels)


def regression(seed):
    """2-40-40-1 on sin(8 x) cos(6 y), 400 samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    x = torch.rand(400, 2)
    y = (torch.sin(8 * x[:, :1]) * torch.cos(6 * x[:, 1:]))
    return model, lambda: F.mse_loss(model(x), y)


class Transformer(nn.Module):
    """One encoder layer of width 32 over tokens a, b of addition modulo 31."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 31)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens)).mean(1))


def transformer(seed):
    """Addition modulo 31, 480 of its 961 pairs."""
    torch.manual_seed(seed)
    model = Transformer()
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))[torch.randperm(961)[:480]]
    labels = pairs.sum(1) % 31
    return model, lambda: F.cross_entropy(model(pairs), labels)


def run(make, seed, truncate, damping):
    """Solves, CG iterations, trials, truncated steps and the loss after STEPS; the loss at the step that ends BUDGET."""
    model, closure = make(seed)
    cg = pgdfast.CG(truncate=truncate)
    optimizer = pgdfast.LM(model.parameters(), damping=damping, solver="cg", cg=cg)
    solves, iterations, trials, truncated = 0, 0, 0, 0
    solve = pgdfast.solve

    def counted(*arguments, **options):
        nonlocal solves, iterations
        solution = solve(*arguments, **options)
        solves, iterations = solves + 1, iterations + solution.iterations
        return solution

    with mock.patch.object(backend, "solve", counted):
        step, after_steps, after_budget = 0, None, None
        while after_steps is None or after_budget is None:
            optimizer.step(closure)
            step += 1
            trials += optimizer.report.trials
            truncated += optimizer.report.solve_status == "truncated" and optimizer.report.status == "accepted"
            if step == STEPS:
                after_steps = solves, iterations, trials, truncated, float(closure().detach())
            if iterations >= BUDGET and after_budget is None:
                after_budget = float(closure().detach())
    return *after_steps, after_budget


def main():
    print(f"{'problem':12} {'mu':>6} {'seed':>4}   {'':9} solves iterations trials kept  loss after {STEPS}  "
          f"after {BUDGET} iterations")
    for make in (classifier, regression, transformer):
        for damping in (1e-2, 1e-5):
            for seed in (0, 1):
                for truncate in (False, True):
                    *counts, loss, at_budget = run(make, seed, truncate, damping)
                    solves, iterations, trials, kept = counts
                    print(f"{make.__name__:12} {damping:6.0e} {seed:4}   {'truncated' if truncate else 'solved':9} {solves:6} "
                          f"{iterations:10} {trials:6} {kept:4}  {loss:13.2e}  {at_budget:.2e}", flush=True)


if __name__ == "__main__":
    main()
