"""Parameters as real numbers: of a complex one two for each entry, its real and imaginary part side by side.

torch.optim's optimizers train complex parameters so. Autograd's leaves are the parameters themselves, and its gradient of a
real loss, d/d(real part) + i d/d(imaginary part), is the pair of derivatives by the two.
"""

from __future__ import annotations

import torch


def has_complex(params) -> bool:
    """Whether a parameter is complex.

    Raises ValueError for a lazy conjugate, whose memory holds other numbers than it stands for.
    """
    for k, p in enumerate(params):
        if p.is_complex() and p.is_conj():
            raise ValueError(
                f"pgdfast.LM: parameter {k}, of shape {tuple(p.shape)}, is a lazy conjugate; take w.resolve_conj() of it."
            )
    return any(p.is_complex() for p in params)


def real_views(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """The real numbers of parameters in their own memory: views (*, 2) of complex ones, the others themselves."""
    return [torch.view_as_real(p.detach()) if p.is_complex() else p for p in params]


def real_gradient(g: torch.Tensor) -> torch.Tensor:
    """Autograd's gradient by a parameter as that by its real numbers."""
    return torch.view_as_real(g.resolve_conj().resolve_neg()) if g.is_complex() else g


def real_size(p: torch.Tensor) -> int:
    """How many real numbers a parameter holds."""
    return 2 * p.numel() if p.is_complex() else p.numel()


def shaped_as(p: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Real numbers (*, real_size(p)) as tensors (*, *p.shape), of p's dtype."""
    lead = flat.shape[:-1]
    if not p.is_complex():
        return flat.reshape((*lead, *p.shape)).to(p.dtype)
    re, im = flat.reshape((*lead, *p.shape, 2)).to(p.dtype.to_real()).unbind(-1)
    return torch.complex(re, im)   # a view needs pairs at even places in memory
