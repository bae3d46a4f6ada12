"""Triton kernels: the second implementation of the core's products and solves, for CUDA devices.

One file per kernel, its formula as docstring; `backend.py` runs programs with them. Nothing here imports Triton before
kernels are asked for. With TRITON_INTERPRET=1, set before Triton's first import, they run on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch

OLDEST = (3, 4)
LIMITS = (
    "on CUDA devices of compute capability 8.0 or later, in float32 and float64 (on any device with TRITON_INTERPRET=1, "
    "slowly, for tests)"
)


def _version() -> tuple[int, int] | None:
    """Of the installed Triton, without importing it."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            major, minor, *_ = importlib.metadata.version(name).split(".")
            return int(major), int(minor)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
    return None


@functools.cache
def available() -> str | None:
    """None, or why Triton cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    version = _version()
    if version is None:
        return "the version of the installed Triton cannot be told; reinstall it: pip install triton"
    if version < OLDEST:
        return f"Triton is too old ({version[0]}.{version[1]} < {OLDEST[0]}.{OLDEST[1]}); pip install -U triton"
    if not interpreted() and not torch.cuda.is_available():
        return "Triton is installed but there is no CUDA device"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs on CUDA devices of compute capability 8.0 or later in float32 and float64; under the interpreter on any."""
    if dtype not in (torch.float32, torch.float64):
        return False
    if interpreted():
        return True
    return device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0))


def Kernels(program, dtype: torch.dtype):
    """Bindable kernels for a program; imports Triton."""
    from .backend import Kernels

    return Kernels(program, dtype)
