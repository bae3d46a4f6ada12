"""Programs and row layouts as lists of numbers, which csrc/plan/read.cpp reads for the CPU and for CUDA alike."""

from __future__ import annotations

import torch


def words(numbers: list[int]) -> torch.Tensor:
    """A list of numbers in memory that C reads."""
    return torch.tensor(numbers, dtype=torch.int64)


def encoded(program) -> tuple[torch.Tensor, list[float]]:
    """A program as csrc/plan/read.h has it: words, and the alpha of every instruction."""
    numbers = [len(program.buffers)]
    for (role, size), live in zip(program.buffers, program.live, strict=True):
        numbers += [role, size, live]
    numbers.append(len(program.instructions))
    for op in program.instructions:
        numbers += [op.kind, op.y, op.y_offset, op.x, op.x_offset, op.constant, op.c_offset, len(op.extents)]
        for extent in op.extents:
            numbers += [len(extent), *extent]
    return words(numbers), [op.alpha for op in program.instructions]


def encoded_rows(rows) -> torch.Tensor:
    """A row layout as csrc/plan/read.h has it."""
    numbers = [rows.num_rows, rows.max_outputs]
    for values in (rows.output_of, rows.k_of):
        numbers += [len(values), *values]
    numbers.append(len(rows.blocks))
    for *five, listed in rows.blocks:
        numbers += [*five, len(listed), *listed]
    numbers.append(len(rows.uses))
    for use in rows.uses:
        numbers += use
    numbers.append(len(rows.labels))
    parts = [words(numbers)]
    for buffer, label in rows.labels.items():
        parts += [words([buffer, len(label)]), torch.from_numpy(label).to(torch.int64)]
    return torch.cat(parts)
