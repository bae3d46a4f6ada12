"""How much memory there is to be had, on the machine, in its control group, or on a GPU."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch


def memory_limit(device: torch.device) -> float:
    """Bytes that a solve may take: half of what is available now."""
    available = available_memory(device)
    return 0.5 * available if available < math.inf else 4e9


def available_memory(device: torch.device, root: Path = Path("/")) -> float:
    """Bytes that can be had on a device; infinity where the system does not say.

    On a CPU what Linux calls available, caches included that it would give back, and not more than the control group of this
    process may still take. On a GPU the device's free memory and what PyTorch's allocator holds of it unused. root: of the file
    system that tells.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return min(_of_machine(root), _of_control_group(root))


def _of_machine(root: Path) -> float:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def _of_control_group(root: Path) -> float:
    """What the groups of this process, each within the next, leave of their limits."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return math.inf
    least = math.inf
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        second = controllers == ""
        if not second and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup" if second else "sys/fs/cgroup/memory")
        names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inner = top / path.strip("/")
        for folder in (inner, *inner.parents):   # a container may see its own group at the top
            least = min(least, _left(folder, *names))
            if folder == top:
                break
    return least


def _left(folder: Path, limit: str, usage: str) -> float:
    """Of one group's limit; pages of files that nobody has touched lately are given back where they are needed."""
    try:
        allowed = int((folder / limit).read_text(encoding="ascii"))
        used = int((folder / usage).read_text(encoding="ascii"))
    except (OSError, ValueError):   # there is no such file, or no limit ("max")
        return math.inf
    try:
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        used -= int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return float(max(allowed - max(used, 0), 0))
