"""More rows than one wants in memory: exact LM steps on a DataLoader, beside Adam for the same seconds.

    python examples/streaming.py

The closure gets a batch; the step is that of the mean over all rows, whatever the batches: every step sees all rows.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import pgdfast

options = argparse.ArgumentParser()
options.add_argument("--rows", type=int, default=50_000)
options.add_argument("--batch", type=int, default=2_000)
options.add_argument("--steps", type=int, default=25)
options.add_argument("--progress", action="store_true", help="say on standard error which batch a step is at")
options = options.parse_args()


class Rows(Dataset):
    """Rows that are made, or read from disk, when they are asked for: nothing holds all of them."""

    def __len__(self):
        return options.rows

    def __getitems__(self, numbers):   # a whole batch at once
        x = torch.sin(torch.tensor(numbers, dtype=torch.float64)[:, None] * torch.arange(1.0, 9.0, dtype=torch.float64) ** 0.5)
        return x, torch.sin(3 * x[:, :1]) * x[:, 1:2] + x[:, 2:3] ** 2


def network():
    """A fresh network; equal seeds make equal ones."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    return torch.nn.Sequential(*layers).double()


def mean_over_all(model):
    """The loss on all rows, batch by batch."""
    with torch.no_grad():
        return sum(float(F.mse_loss(model(x), y)) * len(x) for x, y in loader) / options.rows


# A step goes through the loader several times and has to meet the same rows each time: no shuffling.
loader = DataLoader(Rows(), batch_size=options.batch, collate_fn=lambda batch: batch)

model = network()
optimizer = pgdfast.LM(model.parameters())


def closure(batch):
    """The loss of one batch, as it is for Adam; a mean takes its part of the mean over all rows, the last, shorter one too."""
    return F.mse_loss(model(batch[0]), batch[1])


start = time.perf_counter()
for step in range(options.steps):
    loss = optimizer.step(closure, loader, progress=options.progress)
    print(f"step {step + 1}  loss {float(loss):.3e}  {time.perf_counter() - start:.1f} s  {optimizer.report.solver}")
seconds = time.perf_counter() - start

adam_model = network()
adam = torch.optim.Adam(adam_model.parameters(), lr=1e-3)
shuffled, start, count = DataLoader(Rows(), options.batch, shuffle=True, collate_fn=lambda batch: batch), time.perf_counter(), 0
while time.perf_counter() - start < seconds:
    for x, y in shuffled:
        adam.zero_grad()
        F.mse_loss(adam_model(x), y).backward()
        adam.step()
        count += 1
        if time.perf_counter() - start >= seconds:
            break
print(f"after {seconds:.1f} s  LM: {mean_over_all(model):.3e} ({options.steps} steps)  "
      f"Adam: {mean_over_all(adam_model):.3e} ({count} steps)")
