"""The neural tangent kernel of a closure, J J^T: how far it has moved, and how it is aligned with a target."""

from __future__ import annotations

import os

import torch

from .backend import backend as choose_backend


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


class Probe:
    """Linearises a closure again and again, for its Gram matrix."""

    def __init__(self, name: str, closure, backend: str = "auto"):
        if not callable(closure):
            raise TypeError(f"pgdfast.{name}: closure is {closure!r}; it must be a callable that returns the residuals.")
        self.name, self.closure, self._backend = name, closure, choose_backend(backend)

    def __call__(self, params, copies: int = 2):
        """(K, r): the Gram matrix (M, M) and the residual (M,) at the present parameters.

        copies: how many float64 matrices of K's size must fit into the free memory, or MemoryError before any is made.
        """
        params = [p for p in params if p.requires_grad]
        if not params:
            raise ValueError(f"pgdfast.{self.name}: no parameter requires a gradient; unfreeze one or pass others.")
        lin = self._backend.linearize(self.closure, params)
        M, free = lin.num_residuals, free_memory(params[0].device)
        if M == 0:
            raise ValueError(f"pgdfast.{self.name}: the closure has no residuals; give it samples.")
        if 8 * copies * M * M > free:
            raise MemoryError(
                f"pgdfast.{self.name}: {copies} matrices of M x M for M = {M:,} residuals take {8e-9 * copies * M * M:.3g} GB "
                f"and {1e-9 * free:.3g} GB are free; let the closure return fewer residuals, those of some of the samples."
            )
        return lin.gram(), lin.residual


def free_memory(device: torch.device) -> float:
    """Bytes that can be had on a device; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:   # counts caches that the system would give back
            lines = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")
