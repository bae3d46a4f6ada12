"""Optimizers by name: what `--optimizers` may say and what it builds."""

import math
from dataclasses import dataclass

import torch

import pgdfast
from pgdfast_experiments.errors import UsageError

GN_RCOND = 1e-8
"""Gauss-Newton leaves out eigenvalues of J J^T below this fraction of the largest."""

_TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "lbfgs": torch.optim.LBFGS}


@dataclass(frozen=True)
class Method:
    """An optimizer with the settings that its name implies.

    kind: "sgd", "adam", "adamw", "lbfgs", "lm" or "hybrid". damping: mu where the name gives it (0 for Gauss-Newton by the
    pseudo-inverse), None where the task sets it, and for the others.
    """

    name: str
    label: str
    kind: str
    damping: float | None = None

    @property
    def second_order(self):
        """Whether the closure is LM's: a loss or residuals without backward()."""
        return self.kind in ("lm", "hybrid")

    @property
    def together(self):
        """Whether networks trained by it may share an ensemble: LM alone.

        Not Gauss-Newton: the cut of its pseudo-inverse magnifies rounding until a member no longer follows the run that it
        would be by itself, and its eigendecompositions gain nothing from company.
        """
        return self.kind == "lm" and self.damping != 0

    def build(self, params, lr, backend="auto", **options):
        """Return the optimizer over `params`; `options` go to it, and for LM go before the paper's plain LM."""
        if self.kind == "lm":
            settings = {"damping_rule": "constant", "rcond": GN_RCOND, **options}
            if self.damping is not None:
                settings["damping"] = self.damping
            return pgdfast.LM(params, lr=lr, backend=backend, **settings)
        return _TORCH[self.kind](params, lr=lr, **options)


_PLAIN = {
    "sgd": Method("sgd", "SGD", "sgd"),
    "adam": Method("adam", "Adam", "adam"),
    "adamw": Method("adamw", "AdamW", "adamw"),
    "lbfgs": Method("lbfgs", "L-BFGS", "lbfgs"),
    "gn": Method("gn", "Gauss-Newton", "lm", damping=0.0),
    "lm": Method("lm", "LM", "lm"),
    "hybrid": Method("hybrid", "hybrid", "hybrid"),
    "hybrid-plateau": Method("hybrid-plateau", "hybrid, measured switch", "hybrid"),
}


def parse(name, known=tuple(_PLAIN)):
    """Return the method called `name`, or None when there is none of that name among the `known`.

    `lm-MU` with a number MU > 0 is known where "lm-MU" is.
    """
    if name in _PLAIN:
        return _PLAIN[name] if name in known else None
    if not name.startswith("lm-") or "lm-MU" not in known:
        return None
    try:
        mu = float(name.removeprefix("lm-"))
    except ValueError:
        return None
    if not (math.isfinite(mu) and mu > 0):
        return None
    return Method(f"lm-{mu:g}", f"LM, mu = {mu:g}", "lm", damping=mu)


def check_backend(methods, backend):
    """Take one LM step on a toy problem: a backend that cannot run is refused before the work."""
    if not any(method.second_order for method in methods):
        return
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    try:
        pgdfast.LM([weight], damping=0.5, backend=backend).step(lambda: weight * 2 - 1)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UsageError(f"--backend {backend} cannot run here: {error}") from error
