"""Which implementation runs where: an ordered list, each saying when it applies."""

from __future__ import annotations

import os
import warnings

import torch

from . import cuda, native, torch_kernels, triton_kernels

NAMES = ("auto", "native", "triton", "torch", "reference")

# Fastest first. Each has `available() -> reason or None`, `applies(device, dtype) -> bool` and `Kernels(program, dtype)`. A
# word behind the name tells implementations apart that one name asks for.
IMPLEMENTATIONS = {"native": native, "native (CUDA)": cuda, "triton": triton_kernels, "torch": torch_kernels}


def backends() -> dict[str, str]:
    """Every backend name with "available" or the reason why it cannot be used here."""
    status = {name: module.available() or "available" for name, module in IMPLEMENTATIONS.items()}
    status["reference"] = "available"
    return status


def requested(backend: str) -> str:
    """The backend asked for by argument or by PGDFAST_BACKEND (the argument wins).

    Raises ValueError for an unknown name and RuntimeError for one that cannot be used here.
    """
    name = backend if backend != "auto" else os.environ.get("PGDFAST_BACKEND", "auto")
    if name not in NAMES:
        raise ValueError(f"pgdfast: unknown backend {name!r}; use one of {', '.join(NAMES)}.")
    if name != "auto":
        state = backends()[name]
        if state != "available":
            usable = [key for key, value in backends().items() if value == "available" and key in NAMES]
            raise RuntimeError(f"pgdfast: backend {name!r} cannot be used: {state}; use one of {', '.join(usable)}.")
    return name


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def serves_members(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Whether the kernels of a program would solve for the members of an ensemble in one call."""
    for name, module in IMPLEMENTATIONS.items():
        if backend in ("auto", name.split()[0]) and module.applies(device, dtype) and not module.available():
            return module.Kernels.solves_members
    return False


def kernels_for(program, device: torch.device, backend: str, dtype: torch.dtype | None = None):
    """Bindable kernels for a program: the requested implementation, or the first that applies.

    dtype: of the products, the program's own unless a wider one is asked for.
    """
    dtype = dtype or program.dtype
    limits = []
    for name, module in IMPLEMENTATIONS.items():
        if backend not in ("auto", name.split()[0]):
            continue
        limits.append(module.LIMITS)
        if not module.applies(device, dtype):
            continue
        reason = module.available()
        if not reason:
            made = module.Kernels(program, dtype)
            made.device = device
            return made
        if backend != "auto":
            raise RuntimeError(f"pgdfast: backend {backend!r} cannot be used for {dtype} on {device}: {reason}.")
        _say_once(f"pgdfast: {reason}; the next backend is used, much slower.")
    if backend != "auto":
        raise RuntimeError(
            f"pgdfast: backend {backend!r} was asked for but runs only {' and '.join(limits)}; the closure's tensors are "
            f"{dtype} on {device}."
        )
    raise RuntimeError(f"pgdfast: no implementation for {dtype} on {device}.")
