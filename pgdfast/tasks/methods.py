"""Optimizers by name: what `--optimizers` may say and what it builds."""

import math
from dataclasses import dataclass

import torch

import pgdfast
from pgdfast.tasks.errors import UsageError

NAMES = "sgd, adam, gn, lm-MU with MU > 0 (for example sgd,lm-0.5,gn)"

GN_RCOND = 1e-8
"""Gauss-Newton leaves out eigenvalues of J J^T below this fraction of the largest."""


@dataclass(frozen=True)
class Method:
    """An optimizer with the settings that its name implies.

    `damping` is mu for LM (0: Gauss-Newton by the pseudo-inverse), None for a first-order method.
    """

    name: str
    label: str
    damping: float | None = None

    @property
    def second_order(self):
        """Whether the closure returns a residual tensor (LM); else a loss, after its backward."""
        return self.damping is not None

    def build(self, params, lr, backend="auto"):
        """Return the optimizer over `params`: the paper's plain LM, or the one of torch.optim."""
        if self.second_order:
            return pgdfast.LM(
                params,
                lr=lr,
                damping=self.damping,
                damping_rule="constant",
                rcond=GN_RCOND,
                backend=backend,
            )
        return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.name](params, lr=lr)

    def settings(self, lr, backend):
        """Return what `build` passes on, as plain values for the record."""
        if self.second_order:
            return {
                "optimizer": "pgdfast.LM",
                "lr": lr,
                "damping": self.damping,
                "damping_rule": "constant",
                "rcond": GN_RCOND,
                "backend": backend,
                "loss": "1/2 sum of squared residuals",
            }
        kind = {"sgd": "torch.optim.SGD", "adam": "torch.optim.Adam"}[self.name]
        return {"optimizer": kind, "lr": lr, "loss": "1/2 mean of squared residuals"}


_PLAIN = {
    "sgd": Method("sgd", "SGD"),
    "adam": Method("adam", "Adam"),
    "gn": Method("gn", "Gauss-Newton", damping=0.0),
}


def parse(name):
    """Return the method called `name`, or None when there is none of that name."""
    if name in _PLAIN:
        return _PLAIN[name]
    if not name.startswith("lm-"):
        return None
    try:
        mu = float(name.removeprefix("lm-"))
    except ValueError:
        return None
    if not (math.isfinite(mu) and mu > 0):
        return None
    return Method(f"lm-{mu:g}", f"LM, mu = {mu:g}", damping=mu)


def check_backend(methods, backend):
    """Take one LM step on a toy problem: a backend that cannot run is refused before the work."""
    if not any(method.second_order for method in methods):
        return
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    try:
        optimizer = parse("lm-0.5").build([weight], lr=1.0, backend=backend)
        optimizer.step(lambda: weight * 2 - 1)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UsageError(f"--backend {backend} cannot run here: {error}") from error
