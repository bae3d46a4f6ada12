"""What exceptions of PyTorch say."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: PyTorch's allocator for the CPU has no type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
