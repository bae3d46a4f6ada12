"""When Hybrid goes over from LM to the first-order optimizer: measured signs that the lazy phase is over.

A switch is any object with `over(step, lm)`, asked before the first step and after every LM step with the number of LM
steps taken and the LM (its `report` is None before the first): it returns "", or the reason to switch now; and with
`state_dict()` / `load_state_dict(state)`.
"""

from __future__ import annotations

import math

import torch

from .spectra import Probe, kernel_alignment, kernel_drift

VERBS = ("over", "state_dict", "load_state_dict")


def switch(given):
    """The switch of a number of steps, or the object itself.

    Raises ValueError for a number below 1 and TypeError for an object that lacks a verb.
    """
    if isinstance(given, int) and not isinstance(given, bool):
        return After(given)
    lacking = [verb for verb in VERBS if not callable(getattr(given, verb, None))]
    if lacking or isinstance(given, type):
        what = "is a class" if isinstance(given, type) else f"lacks {', '.join(lacking)}"
        raise TypeError(
            f"pgdfast.Hybrid: switch={given!r} {what}; give a number of LM steps, a KernelDrift, Alignment or Plateau, or an "
            f"object with {', '.join(VERBS)}."
        )
    return given


class After:
    """After a fixed number of LM steps, as in arXiv 2601.03162."""

    def __init__(self, steps: int):
        _whole("Hybrid", "switch", steps)
        self.steps = steps

    def over(self, step: int, lm) -> str:
        """Whether that many steps were taken."""
        return f"{step} LM steps were taken" if step >= self.steps else ""

    def state_dict(self) -> dict:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""

    def __repr__(self) -> str:
        return f"after {self.steps} LM steps"


class KernelDrift:
    """When the kernel K = J J^T of a probe has moved: ||K - K0||_F / ||K0||_F >= threshold, K0 that before the first step.

    closure: the probe, which returns residuals or a loss as for LM.step; `lambda: model(x_probe)` on a few dozen fixed
    samples gives the kernel of the outputs alone. threshold: relative drift, > 0; what counts as lazy depends on the problem,
    so look at `drift`, the last one measured. every: LM steps between measurements.

    Cost of a measurement: one run of the probe and its Gram matrix; K0 takes M^2 numbers, in the state as well.
    Limits: a growing scale of the outputs counts as drift. With a cross-entropy in the probe, K is S^T-weighted by the output
    Hessian S S^T and drifts as predictions sharpen, under a fixed Jacobian too. A probe that draws random numbers (dropout)
    measures those. Copies and pickles of the optimizer keep the probe, with the model that it looks at.
    Raises MemoryError where M^2 numbers do not fit.
    """

    def __init__(self, closure, threshold: float = 0.5, every: int = 50):
        self._probe = Probe("KernelDrift", closure)
        self.threshold, self.every = _positive("KernelDrift", "threshold", threshold), _whole("KernelDrift", "every", every)
        self.drift: float | None = None
        self._reference: torch.Tensor | None = None

    def over(self, step: int, lm) -> str:
        """Measure where it is due."""
        if self._reference is None:
            self._reference, _ = self._probe(_parameters(lm), copies=3)
            self.drift = 0.0
        elif step % self.every == 0:
            K, _ = self._probe(_parameters(lm))
            self.drift = kernel_drift(K, self._reference.to(K))
            if self.drift >= self.threshold:
                return f"the kernel has drifted by {self.drift:.3g} of its norm, at least {self.threshold:g}"
        return ""

    def state_dict(self) -> dict:
        """K0 and the last drift."""
        return {"reference": self._reference, "drift": self.drift}

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        self._reference, self.drift = state["reference"], state["drift"]

    def __repr__(self) -> str:
        return f"KernelDrift(threshold={self.threshold:g}, every={self.every})"


class Alignment:
    """When kernel-target alignment, having risen, stops: y^T K y / (||K||_F ||y||^2) of a probe's K = J J^T.

    In the lazy phase it is flat; it rises as features are learned. The sign: it has risen by `rise` over its first value, and
    its best value has not grown by `tolerance` (both relative) in the last `patience` measurements.
    closure: the probe, as for KernelDrift. target: y, one number per residual; None for the probe's residual before the
    first step, which is the target for a probe that returns f - y. every: LM steps between measurements. `history` holds the
    measured values.

    Cost: as KernelDrift, and M numbers of memory between measurements. Limits: as KernelDrift, though the scale of K drops
    out; where the alignment never rises (LM stays lazy, or the target already is aligned) it never switches.
    """

    def __init__(
        self, closure, target: torch.Tensor | None = None, every: int = 50, patience: int = 3, rise: float = 0.05,
        tolerance: float = 0.01,
    ):
        self._probe = Probe("Alignment", closure)
        self.every, self.patience = _whole("Alignment", "every", every), _whole("Alignment", "patience", patience)
        self.rise, self.tolerance = _positive("Alignment", "rise", rise), _positive("Alignment", "tolerance", tolerance)
        self._target = None if target is None else target.detach().reshape(-1).clone()
        self.history: list[float] = []

    def over(self, step: int, lm) -> str:
        """Measure where it is due."""
        if self.history and step % self.every:
            return ""
        K, residual = self._probe(_parameters(lm))
        if self._target is None:
            self._target = residual.clone()
        self.history.append(kernel_alignment(K, self._target))
        before, recent = self.history[:-self.patience], self.history[-self.patience:]
        if not before or max(before) < (1 + self.rise) * self.history[0]:
            return ""
        if max(recent) >= (1 + self.tolerance) * max(before):
            return ""
        return f"the kernel's alignment with the target stopped growing at {max(self.history):.3g}"

    def state_dict(self) -> dict:
        """The measured values and the target."""
        return {"history": list(self.history), "target": self._target}

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        self.history, self._target = list(state["history"]), state["target"]

    def __repr__(self) -> str:
        return f"Alignment(every={self.every}, patience={self.patience}, rise={self.rise:g}, tolerance={self.tolerance:g})"


class Plateau:
    """When progress slows: over `window` LM steps the loss stays above `factor` times what it was.

    of="loss": the mean loss of the last `window` steps against that of the `window` before; the means let mini-batches pass.
    of="model": the linearized model's loss, that before the window less the reductions predicted for the steps kept in it; it
    looks at what LM can still gain rather than at what it gained, and needs a rule or line search that tries its steps.
    window: whole number of steps. factor: between 0 and 1; 0.9 asks for a fall of a tenth.

    Cost: none. Limits: the loss also stalls for other reasons, such as steps rejected in a row or too large a damping; for
    mini-batches choose a window of whole epochs.
    """

    def __init__(self, window: int = 100, factor: float = 0.9, of: str = "loss"):
        self.window = _whole("Plateau", "window", window)
        if not (isinstance(factor, (int, float)) and 0 < factor < 1):
            raise ValueError(f"pgdfast.Plateau: factor is {factor!r}; it must lie between 0 and 1.")
        if of not in ("loss", "model"):
            raise ValueError(f"pgdfast.Plateau: of is {of!r}; use 'loss' or 'model'.")
        self.factor, self.of = float(factor), of
        self._losses: list[float] = []
        self._reductions: list[float] = []

    def over(self, step: int, lm) -> str:
        """Look at the last step's report."""
        report = lm.report
        if self.of == "model" and not lm.predicts:
            raise ValueError(
                "pgdfast.Plateau: of='model' needs predicted reductions, which LM's damping_rule='constant' does not make "
                "without a line search; use of='loss'."
            )
        if report is None or report.status in ("empty", "none"):   # "none": no step was taken yet
            return ""
        length = self.window if self.of == "model" else 2 * self.window
        self._losses = [*self._losses, report.loss][-length:]
        if self.of == "model":
            self._reductions = [*self._reductions, _reduction(report)][-length:]
        if len(self._losses) < length:
            return ""
        if self.of == "model":
            before, after = self._losses[0], self._losses[0] - sum(self._reductions)
        else:
            before, after = (sum(half) / self.window for half in (self._losses[:self.window], self._losses[self.window:]))
        if after < self.factor * before:
            return ""
        what = "mean loss" if self.of == "loss" else "linearized model's loss"
        return f"the {what} went from {before:.4g} to {after:.4g} in {self.window} steps, not below {self.factor:g} times"

    def state_dict(self) -> dict:
        """The last losses and predicted reductions."""
        return {"losses": list(self._losses), "reductions": list(self._reductions)}

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        self._losses, self._reductions = list(state["losses"]), list(state["reductions"])

    def __repr__(self) -> str:
        return f"Plateau(window={self.window}, factor={self.factor:g}, of={self.of!r})"


def _reduction(report) -> float:
    """The predicted reduction of a step that was kept, 0 for one that was not."""
    if report.status in ("rejected", "failed") or report.loss_after == report.loss:
        return 0.0
    return report.predicted_reduction


def _parameters(lm) -> list[torch.Tensor]:
    return [p for group in lm.param_groups for p in group["params"]]


def _whole(name: str, option: str, value) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"pgdfast.{name}: {option} is {value!r}; it must be a whole number of 1 or more.")
    return value


def _positive(name: str, option: str, value) -> float:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"pgdfast.{name}: {option} is {value!r}; it must be a finite number above 0.")
    return float(value)
