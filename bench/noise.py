"""What LM does with noise, and what helps: `python -m bench.noise`, some ten seconds.

y = sin(5 x) + noise of standard deviation 0.1 at 100 points of [-1, 1], tanh 1-80-80-1, float32, one thread. Root mean square
error against sin(5 x) on 500 points, by seed, and the median.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import nn

import pgdfast

SEEDS, NOISE = range(3), 0.1


class Fit:
    """A network and its noisy data; `held_out` is another draw of the points and of the noise."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(1, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 1))
        self.data, self.held_out = self._draw(), self._draw()
        self.test = torch.linspace(-1, 1, 500)[:, None]

    @staticmethod
    def _draw():
        x = 2 * torch.rand(100, 1) - 1
        return x, torch.sin(5 * x) + NOISE * torch.randn(100, 1)

    def loss(self, penalty=0.0, data=None):
        """The mean square error on the data, with a penalty on the parameters."""
        x, y = self.data if data is None else data
        loss = F.mse_loss(self.net(x), y)
        return loss + penalty * sum(p.square().sum() for p in self.net.parameters()) if penalty else loss

    def error(self):
        """Root mean square, against the function without noise."""
        with torch.no_grad():
            return float((self.net(self.test) - torch.sin(5 * self.test)).square().mean().sqrt())


def by_lm(seed, steps=100, penalty=0.0, **options):
    """The error after so many steps of LM."""
    fit = Fit(seed)
    optimizer = pgdfast.LM(fit.net.parameters(), **options)
    for _ in range(steps):
        optimizer.step(lambda: fit.loss(penalty))
    return fit.error()


def by_adam(seed, steps=2000):
    """The error after so many steps of Adam."""
    fit = Fit(seed)
    optimizer = torch.optim.Adam(fit.net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        fit.loss().backward()
        optimizer.step()
    return fit.error()


def stopped(seed, steps=100):
    """(error at the smallest loss on held-out data, after how many steps)."""
    fit = Fit(seed)
    optimizer, best = pgdfast.LM(fit.net.parameters()), (float("inf"), 0.0, 0)
    for step in range(steps):
        optimizer.step(fit.loss)
        with torch.no_grad():
            best = min(best, (float(fit.loss(data=fit.held_out)), fit.error(), step + 1))
    return best[1], best[2]


ROWS = {
    "20 steps": lambda seed: by_lm(seed, 20),
    "100 steps": by_lm,
    "100 steps, penalty 1e-3 times the sum of squared parameters": lambda seed: by_lm(seed, penalty=1e-3),
    "the same, 1e-4": lambda seed: by_lm(seed, penalty=1e-4),
    "the same, 1e-5": lambda seed: by_lm(seed, penalty=1e-5),
    "100 steps, `Auto(smallest=0.1)`": lambda seed: by_lm(seed, damping_rule=pgdfast.Auto(smallest=0.1)),
    "100 steps, `GainRatio(smallest=0.1)`": lambda seed: by_lm(seed, damping_rule=pgdfast.GainRatio(smallest=0.1)),
    "100 steps, `weight_decay=1e-2` (decoupled)": lambda seed: by_lm(seed, weight_decay=1e-2),
    "Adam, lr 1e-3, 2,000 steps": by_adam,
}


def main():
    torch.set_num_threads(1)
    print("| | three seeds | median |\n|---|---|---|")

    def row(what, errors):
        print(f"| {what} | {', '.join(f'{e:.3f}' for e in errors)} | {statistics.median(errors):.3f} |", flush=True)

    for what, run in ROWS.items():
        row(what, [run(seed) for seed in SEEDS])
    ends = [stopped(seed) for seed in SEEDS]
    row(f"stopped at the smallest held-out loss (after {', '.join(str(n) for _, n in ends)} steps)", [e for e, _ in ends])


if __name__ == "__main__":
    main()
