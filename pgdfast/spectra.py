"""The neural tangent kernel of a closure, K = J J^T: its eigenvalues and the error in its modes, drift and alignment.

The modes of the error e in the linearized model, with lambda_i, q_i the eigenpairs of K and e_i = q_i . e:

    gradient descent   d e_i/dt = -lambda_i e_i
    LM                 d e_i/dt = -lambda_i / (mu + lambda_i) e_i
    Gauss-Newton       d e_i/dt = -e_i where lambda_i > rcond lambda_max, else 0

A step of length lr multiplies e_i by 1 - lr rate_i. Source: arXiv 2601.03162, section 2.

Letters: M residuals, K (M, M), mu damping.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field

import torch

from .backend import backend as choose_backend
from .kernels.memory import available_memory
from .parts import Batched, chosen_group


def kernel_drift(K: torch.Tensor, K0: torch.Tensor) -> float:
    """||K - K0|| / ||K0|| in the Frobenius norm: 0 while training is lazy, of order 1 once features are learned.

    K, K0: (M, M) of one dtype. NaN where K0 is 0.
    Source: the lazy regime is that of Chizat, Oyallon and Bach, On Lazy Training in Differentiable Programming (2019).
    """
    _square("kernel_drift", K)
    if K0.shape != K.shape:
        raise ValueError(
            f"pgdfast.kernel_drift: K0 has shape {tuple(K0.shape)} and K has {tuple(K.shape)}; both must be Gram matrices "
            "of the same closure."
        )
    return float((K - K0).norm() / K0.norm())


def kernel_alignment(K: torch.Tensor, target: torch.Tensor) -> float:
    """y^T K y / (||K||_F ||y||^2): 1 where K = y y^T, 0 where K does not see y.

    K: (M, M). target: y, M entries of any shape, in the order of the residuals. NaN where K or y is 0.
    Source: Cristianini, Shawe-Taylor, Elisseeff and Kandola, On Kernel-Target Alignment (2001).
    """
    _square("kernel_alignment", K)
    if target.numel() != len(K):
        raise ValueError(
            f"pgdfast.kernel_alignment: the target has {target.numel()} entries and K has {len(K)} rows; give one entry per "
            "residual."
        )
    y = target.detach().reshape(-1).to(K)
    return float(torch.dot(y, K @ y) / (K.norm() * torch.dot(y, y)))


def _square(name: str, K: torch.Tensor) -> None:
    if K.dim() != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"pgdfast.{name}: K has shape {tuple(K.shape)}; it must be a Gram matrix (M, M).")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of K = J J^T and the residual in its modes, float64 on the CPU, largest eigenvalue first.

    Attributes: eigenvalues (n,); eigenvectors (M, n), column i is q_i; coefficients (n,), q_i . r, whose signs are those of
    the eigenvectors; cutoff: eigenvalues at or below it are rounding. n = M modes, or fewer in `resolved_modes`.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor = field(repr=False)
    coefficients: torch.Tensor
    cutoff: float

    @property
    def resolved(self) -> int:
        """How many eigenvalues are above rounding: M max(eps, eps_model^2) lambda_max.

        eps is that of the sums in K, float64 where that was to be had. A float32 model's own rounding eps_model moves the
        singular values of J, hence enters squared.
        """
        return int((self.eigenvalues > self.cutoff).sum())

    @property
    def resolved_modes(self) -> Spectrum:
        """The modes above rounding alone, whose condition numbers are finite."""
        n = self.resolved
        return Spectrum(self.eigenvalues[:n], self.eigenvectors[:, :n], self.coefficients[:n], self.cutoff)

    @property
    def kappa_gd(self) -> float:
        """lambda_max / lambda_min: how much faster gradient descent's quickest mode falls than its slowest.

        Infinity where an eigenvalue is at rounding level, as in every K with more residuals than parameters: that mode's rate
        cannot be told from 0. `resolved_modes.kappa_gd` leaves such modes out.
        """
        return self._ratio(self.eigenvalues)

    def kappa_lm(self, mu: float) -> float:
        """(lambda_max / lambda_min) (lambda_min + mu) / (lambda_max + mu): how much faster LM's quickest mode falls.

        Below 2 for mu = lambda_min, 1 for mu = 0; infinity as for `kappa_gd`. Raises ValueError for mu < 0.
        """
        return self._ratio(self.rates_lm(mu))

    def _ratio(self, rates: torch.Tensor) -> float:
        whole = 0 < len(rates) == self.resolved
        return float(rates[0] / rates[-1]) if whole else math.inf

    @property
    def rates_gd(self) -> torch.Tensor:
        """lambda_i, (n,): the rates of gradient descent on 1/2 ||r||^2."""
        return self.eigenvalues.clamp_min(0)

    def rates_lm(self, mu: float) -> torch.Tensor:
        """lambda_i / (lambda_i + mu), (n,): the rates of LM with damping mu >= 0."""
        if not (isinstance(mu, (int, float)) and 0 <= mu < math.inf):
            raise ValueError(f"pgdfast.Spectrum: mu is {mu!r}; it must be a finite number that is not negative.")
        values = self.eigenvalues.clamp_min(0)
        return torch.where(values > 0, values / (values + mu), 0.0)

    def rates_gn(self, rcond: float = 1e-8) -> torch.Tensor:
        """1 where lambda_i > rcond lambda_max, else 0, (n,): the rates of Gauss-Newton with LM's cut at rcond."""
        if not (isinstance(rcond, (int, float)) and 0 <= rcond < 1):
            raise ValueError(f"pgdfast.Spectrum: rcond is {rcond!r}; it must lie between 0 and 1.")
        return (self.eigenvalues > rcond * self.eigenvalues[:1]).to(self.eigenvalues)

    def save_csv(self, path) -> None:
        """Write mode, eigenvalue, coefficient, resolved (1 or 0), a row per mode; every float reads back as itself."""
        pairs = zip(self.eigenvalues.tolist(), self.coefficients.tolist(), strict=True)
        rows = ([k, value, c, int(value > self.cutoff)] for k, (value, c) in enumerate(pairs, start=1))
        _write(path, ["mode", "eigenvalue", "coefficient", "resolved"], rows)

    def plot(self, path=None, mus=()):
        """Draw the eigenvalues and the error in each mode; return the matplotlib Figure.

        path: where to save it (PNG, PDF, ...), or None. mus: dampings to mark among the eigenvalues. Needs matplotlib.
        """
        figure, (left, right) = _figure("Spectrum.plot", "Neural tangent kernel", 1, 2)
        modes = range(1, len(self.eigenvalues) + 1)
        left.plot(modes, _positive(self.eigenvalues), ".-", color=_COLORS[0])
        left.axhline(max(self.cutoff, 1e-300), color="#999999", linestyle=":", label="rounding")
        for k, mu in enumerate(mus, start=1):
            left.axhline(mu, color=_COLORS[k % len(_COLORS)], linestyle="--", label=f"mu = {mu:g}")
        left.legend(frameon=False)
        right.plot(modes, _positive(self.coefficients.abs()), ".", color=_COLORS[0])
        for axes, title in ((left, "eigenvalue"), (right, "error |q . r|")):
            _label(axes, title, "mode", log=True)
        return _saved(figure, path)


def ntk_spectrum(closure, params, *, batches=None, process_group=None, backend: str = "auto") -> Spectrum:
    """The spectrum of K = J J^T of a closure at the present parameters, for any model.

    closure: as for LM.step. For `lambda: model(x)` K is the neural tangent kernel of the outputs; for residuals f - y too, and
    the coefficients are the error in its modes. A scalar loss is taken as written: the mean of F.mse_loss puts 2/(N O) into
    K. For cross-entropies J is S^T dF, S S^T the Hessian in the outputs: K is that of the generalized Gauss-Newton matrix.
    Penalties are left out. params: tensors or an iterable of them; frozen ones do not count. batches, process_group: as for
    linearize, of whose rows K is then made. backend: as for LM.

    Cost: one run of the closure, the Gram matrix, and an eigendecomposition of about 9 M^3 operations; five float64 matrices
    of M x M in memory. Nothing is changed.
    Raises MemoryError when these do not fit into the free memory, before any is made; ValueError for a closure without
    residuals, with a loss or Jacobian that is not finite, or one that LM refuses.
    """
    probe, params = Probe("ntk_spectrum", closure, backend, batches, process_group), list(params)
    return _spectrum(*probe(params, copies=5, wide=True), params, probe.name)


def _spectrum(K: torch.Tensor, residual: torch.Tensor, params, name: str) -> Spectrum:
    rounding = torch.finfo(K.dtype).eps
    model = max(torch.finfo(p.dtype).eps for p in params if p.requires_grad)
    K = K.double()
    if not bool(torch.isfinite(K).all()):
        raise ValueError(f"pgdfast.{name}: the Jacobian has NaN or infinity; check the model's operations at these parameters.")
    values, vectors = torch.linalg.eigh(0.5 * (K + K.T))
    values, vectors = values.flip(0).cpu(), vectors.flip(1).cpu()
    cutoff = len(values) * max(rounding, model**2) * max(float(values[0]), 0.0)
    return Spectrum(values, vectors, vectors.T @ residual.detach().double().cpu(), cutoff)


class SpectrumHistory:
    """Records a closure's spectrum over training: eigenvalues, the error in the first modes, drift and alignment.

    closure, params, backend: as for ntk_spectrum; the number of residuals M must stay. modes: how many of the leading
    eigenvalues and modes are kept. target: y for the alignment, M entries; None for the first recorded residual.
    `rows` holds a dict per record: step, resolved, kappa_gd (of the resolved modes), drift from the first K, alignment,
    residual_norm, eigenvalue_1 ..., mode_1 ...: |q_i . r| along the eigenvectors of the *first* K, so that a curve follows
    one direction throughout.

    Cost: as ntk_spectrum for each record; the first K and its leading eigenvectors stay in memory.
    """

    def __init__(self, closure, params, *, modes: int = 10, target: torch.Tensor | None = None, backend: str = "auto"):
        if not isinstance(modes, int) or isinstance(modes, bool) or modes < 1:
            raise ValueError(f"pgdfast.SpectrumHistory: modes is {modes!r}; it must be a whole number of 1 or more.")
        self._probe, self._params = Probe("SpectrumHistory", closure, backend), list(params)
        self._modes, self._target = modes, target
        self._first: torch.Tensor | None = None
        self.rows: list[dict] = []

    def record(self, step: int) -> Spectrum:
        """Measure at the present parameters and return the whole spectrum, whose modes are those of the present K."""
        K, residual = self._probe(self._params, copies=5 if self._first is None else 6, wide=True)
        first = K if self._first is None else self._first
        target = self._target if self._target is not None else residual.clone()
        drift, alignment = kernel_drift(K, first), kernel_alignment(K, target)
        spectrum = _spectrum(K, residual, self._params, self._probe.name)
        if self._first is None:
            self._basis = spectrum.eigenvectors[:, :self._modes].clone()
        self._first, self._target = first, target
        r = residual.detach().double().cpu()
        values, errors = spectrum.eigenvalues[:self._modes].tolist(), (self._basis.T @ r).abs().tolist()
        self.rows.append({
            "step": step, "resolved": spectrum.resolved, "kappa_gd": spectrum.resolved_modes.kappa_gd, "drift": drift,
            "alignment": alignment, "residual_norm": float(r.norm()),
            **{f"eigenvalue_{k}": value for k, value in enumerate(values, start=1)},
            **{f"mode_{k}": value for k, value in enumerate(errors, start=1)},
        })
        return spectrum

    def save_csv(self, path) -> None:
        """Write a row per record; every float reads back as itself."""
        self._recorded("save_csv")
        _write(path, list(self.rows[0]), (row.values() for row in self.rows))

    def plot(self, path=None):
        """Draw eigenvalues, errors, drift and alignment against the step; return the matplotlib Figure.

        path: where to save it (PNG, PDF, ...), or None. Needs matplotlib.
        """
        self._recorded("plot")
        figure, panels = _figure("SpectrumHistory.plot", "Neural tangent kernel over training", 2, 2)
        steps = [row["step"] for row in self.rows]
        for axes, prefix in zip(panels, ("eigenvalue_", "mode_"), strict=False):
            for k, name in enumerate([name for name in self.rows[0] if name.startswith(prefix)]):
                curve = _positive(torch.tensor([row[name] for row in self.rows], dtype=torch.float64))
                axes.plot(steps, curve, color=_COLORS[k % len(_COLORS)], alpha=1 / (1 + k // len(_COLORS)), label=str(k + 1))
        panels[0].legend(frameon=False, fontsize=8, ncols=2, title="mode")
        for axes, name in ((panels[2], "drift"), (panels[3], "alignment")):
            axes.plot(steps, [row[name] for row in self.rows], color=_COLORS[0])
        for axes, title in zip(panels, ("eigenvalue", "error |q(0) . r|", "drift of K", "alignment with target"), strict=True):
            _label(axes, title, "step", log=axes in panels[:2])
        return _saved(figure, path)

    def _recorded(self, verb: str) -> None:
        if not self.rows:
            raise ValueError(f"pgdfast.SpectrumHistory.{verb}: nothing was recorded; call record(step) first.")


class Probe:
    """Linearizes a closure again and again, for its Gram matrix."""

    def __init__(self, name: str, closure, backend: str = "auto", batches=None, process_group=None):
        if not callable(closure):
            raise TypeError(f"pgdfast.{name}: closure is {closure!r}; it must be a callable that returns the residuals.")
        group = chosen_group(process_group)
        self.name, self._backend = name, choose_backend(backend, group=group)
        self.closure = closure if batches is None and group.size == 1 else Batched(closure, batches)

    def __call__(self, params, copies: int = 2, wide: bool = False):
        """(K, r): the Gram matrix (M, M) and the residual (M,) at the present parameters.

        copies: how many float64 matrices of K's size must fit into the free memory, or MemoryError before any is made. wide:
        sum in float64 for a float32 model too, where its operations all have a rule.
        """
        params = [p for p in params if p.requires_grad]
        if not params:
            raise ValueError(f"pgdfast.{self.name}: no parameter requires a gradient; unfreeze one or pass others.")
        lin = self._backend.linearize(self.closure, params)
        M, free = lin.num_residuals, available_memory(params[0].device)
        if M == 0:
            raise ValueError(f"pgdfast.{self.name}: the closure has no residuals; give it samples.")
        if 8 * copies * M * M > free:
            raise MemoryError(
                f"pgdfast.{self.name}: {copies} matrices of M x M for M = {M:,} residuals take {8e-9 * copies * M * M:.3g} GB "
                f"and {1e-9 * free:.3g} GB are free; let the closure return fewer residuals, those of some of the samples."
            )
        if wide and params[0].dtype.to_real() == torch.float32:
            lin = lin.widened()
        return lin.gram(), lin.residual


_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")   # told apart by colour-blind readers


def _figure(name: str, title: str, rows: int, columns: int):
    """A figure and its panels, without pyplot: no global state, no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pgdfast.{name}: needs matplotlib; pip install 'pgdfast[run]'.") from error
    figure = Figure(figsize=(4.5 * columns, 3.3 * rows), dpi=150, layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _label(axes, title: str, across: str, log: bool) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(across)
    if log:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)


def _positive(values: torch.Tensor) -> list[float]:
    """Values for a logarithmic axis: gaps where there is nothing to show."""
    return torch.where(values > 0, values, math.nan).tolist()


def _saved(figure, path):
    if path is not None:
        figure.savefig(path)
    return figure


def _write(path, header, rows) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
