"""What a step asks of torch.distributed: sums, gathers and one answer to errors, over the ranks of a process group.

Every method of Ranks is a collective: all ranks of the group call it, in the same order. What one rank computes by itself
stands in a `section`, at whose end all ranks learn whether it succeeded everywhere. Alone has the same methods for one process.

Words are numbers sent by one rank. n numbers over R ranks take 2 (R - 1) / R n for a sum (ring all-reduce), (R - 1) / R n for
n gathered numbers of all ranks together and for n of its own exchanged, and (R - 1) / R n for a broadcast, as the mean of all
ranks (Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005).
"""

from __future__ import annotations

import contextlib
import math
from operator import is_
from typing import Any

import torch
import torch.distributed as dist

from .failures import LostRank, combined, described, ranks_named, settled

_gather_into = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)   # its older name
_AT_ONCE = 1 << 20   # parameters of which a checksum is made at once
_LARGE, _FEW = 1 << 16, 8   # from how many numbers on, and up to how many ranks, broadcasts replace a gather
_MIX = 0x1E3779B97F4A7C16   # even; its multiples modulo 2^64 spread


class _Section:
    """A local section as a context manager: see Ranks.section."""

    __slots__ = ("_group",)

    def __init__(self, group):
        self._group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        self._group.settle(error)


class _Sum:
    """A local section that ends in a sum as a context manager: see Ranks.adding."""

    __slots__ = ("_buffer", "_group", "_shape")

    def __init__(self, group, shape, dtype, device):
        self._group, self._shape = group, shape
        self._buffer = torch.zeros(math.prod(shape) + 1, dtype=dtype, device=device)

    def __enter__(self) -> torch.Tensor:
        return self._buffer[:-1].view(self._shape)

    def __exit__(self, kind, error, trace) -> None:
        self._group.settle(error, self._buffer)


class Alone:
    """One process: nothing is exchanged."""

    rank, size, words = 0, 1, 0.0

    def check(self, params: list[torch.Tensor]) -> None:
        """Nothing to compare with."""

    def start(self, params: list[torch.Tensor]) -> None:
        """Nothing to compare with."""

    def total(self, t: torch.Tensor) -> torch.Tensor:
        """`t` itself."""
        return t

    def joined(self, t: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """`t` itself."""
        return t

    def gather(self, t: torch.Tensor, sizes: list[int] | None = None) -> list[torch.Tensor]:
        """[t]."""
        return [t]

    def sizes(self, count: int) -> list[int]:
        """[count]."""
        return [count]

    def objects(self, x: Any) -> list:
        """[x]."""
        return [x]

    def least(self, x: float) -> float:
        """`x` itself."""
        return x

    def same(self, t: torch.Tensor, source: int = 0) -> torch.Tensor:
        """`t` itself."""
        return t

    def columns_of(self, J: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """J itself."""
        return J

    def settle(self, error: BaseException | None = None, buffer: torch.Tensor | None = None) -> None:
        """Raise the error, if there is one."""
        if error is not None:
            raise error

    def left(self, error: BaseException) -> None:
        """Nobody waits."""

    def section(self) -> _Section:
        """A local section, which needs no settling here."""
        return _Section(self)

    def adding(self, shape: tuple, dtype: torch.dtype, device: torch.device) -> _Sum:
        """Zeros to add to."""
        return _Sum(self, shape, dtype, device)

    def agree(self, name: str, value: Any) -> None:
        """Nothing to compare with."""


class Ranks:
    """The ranks of a process group whose processes train the same parameters on different rows.

    Args:
        process_group: of torch.distributed, such as torch.distributed.group.WORLD or one of new_group(); gloo moves CPU
            tensors, NCCL moves CUDA tensors.
        check_every: compare the parameters of all ranks bit for bit at the first step and every so many steps, 0 for the first
            alone. Cost: the time of reading them.

    Raises ValueError where torch.distributed is not initialised or this process is not in the group.

    `rank` and `size` are those of the group, in messages too. `words`: numbers sent by this rank since `start`, by the model at
    the head of this file; what `objects` and the checks exchange is not counted.
    """

    def __init__(self, process_group, check_every: int = 1):
        _check_group(process_group)
        if not isinstance(check_every, int) or isinstance(check_every, bool) or check_every < 0:
            raise ValueError(f"pgdfast.LM: check_every is {check_every!r}; it must be a number of steps, or 0 for never again.")
        self.group, self.check_every = process_group, check_every
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.words, self.device = 0.0, _device_of(process_group)
        self._lost: LostRank | None = None
        self._unsure = False   # whether all ranks have left the last step
        self._checked: list[torch.Tensor] = []
        self._steps = 0

    def __deepcopy__(self, memo) -> Ranks:
        return self

    def __reduce__(self):
        raise TypeError("pgdfast.LM: a process group cannot be pickled; save state_dict() and load it into a new LM.")

    def start(self, params: list[torch.Tensor]) -> None:
        """Begin a step of these parameters: check what is due, then count words from 0. Raises ValueError as the checks do.

        Cost: the parameters are read once where their values are compared, and two numbers are gathered.
        """
        if self._unsure:
            self._run(dist.monitored_barrier if dist.get_backend(self.group) == "gloo" else dist.barrier)
            self._unsure = False
        new = len(params) != len(self._checked) or not all(map(is_, params, self._checked))
        if new:
            self._use_device_of(params)
        due = self.check_every and self._steps % self.check_every == 0 and not new
        mine = torch.tensor([0, new], dtype=torch.int64, device=self.device)
        if due:
            mine[0] = _checksum(params)
        told = self.joined(mine, [2] * self.size).view(-1, 2)
        sums = told[:, 0]
        if told[:, 1].any():
            self.check(params)
            self._checked = list(params)
            self._steps, sums = 0, self.joined(_checksum(params).view(1), [1] * self.size)
        _same_bits(sums.tolist())
        self._steps += 1
        self.words = 0.0

    # --- collectives ------------------------------------------------------------------------------------------------------

    def total(self, t: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place where `t` is contiguous: use what is returned.

        All ranks get the same bits: torch.distributed.all_reduce promises that, and for equal inputs and ranks gloo adds in the
        same order each time. Words: 2 (R - 1) / R n.
        """
        t = t.detach().contiguous()
        if t.numel():
            self._run(dist.all_reduce, t)
            self._count(2 * t.numel())
        return t

    def joined(self, t: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """The tensors of all ranks, one after another along the first dimension, in which alone they may differ.

        sizes: that dimension of every rank's, where it is known on all ranks; else it is exchanged first. Where sizes differ,
        the shorter are sent as long as the longest. Words: (R - 1) max(sizes) times what a row has.
        """
        t, sizes = t.detach().contiguous(), sizes or self.sizes(len(t))
        longest = max(sizes)
        if longest == 0 or 0 in t.shape[1:]:
            return t.new_empty((sum(sizes), *t.shape[1:]))
        rows = sum(sizes)
        if t.device.type == "cpu" and self.size <= _FEW and rows * math.prod(t.shape[1:]) >= _LARGE:
            everything = t.new_empty((rows, *t.shape[1:]))   # gloo's broadcasts are several times as fast as its gather
            for source, part in enumerate(everything.split(sizes)):
                if source == self.rank:
                    part.copy_(t)
                if sizes[source]:
                    self._run(dist.broadcast, part, group_src=source)
            self._count(everything.numel())
            return everything
        if len(t) < longest:
            t = torch.cat([t, t.new_zeros((longest - len(t), *t.shape[1:]))])
        everything = t.new_empty((self.size * longest, *t.shape[1:]))
        self._run(_gather_into, everything, t)
        self._count(everything.numel())
        if min(sizes) == longest:
            return everything
        return torch.cat([part[:count] for part, count in zip(everything.split(longest), sizes, strict=True)])

    def gather(self, t: torch.Tensor, sizes: list[int] | None = None) -> list[torch.Tensor]:
        """The tensors of all ranks, by rank; see `joined`."""
        sizes = sizes or self.sizes(len(t))
        return list(self.joined(t, sizes).split(sizes))

    def sizes(self, count: int) -> list[int]:
        """The counts of all ranks."""
        mine = torch.tensor([count], dtype=torch.int64, device=self.device)
        counts = mine.new_empty(self.size)
        self._run(_gather_into, counts, mine)
        self._count(self.size)
        return counts.tolist()

    def objects(self, x: Any) -> list:
        """Small picklable values of every rank, by rank. Not for tensors; it takes several collectives."""
        everything: list = [None] * self.size
        # NCCL moves them by way of the current device, which need not be that of this rank.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            self._run(dist.all_gather_object, everything, x)
        return everything

    def least(self, x: float) -> float:
        """The least of all ranks' numbers. Raises ValueError on all ranks where one of them is NaN."""
        bad = x != x
        pair = torch.tensor([0.0 if bad else x, -float(bad)], dtype=torch.float64, device=self.device)
        self._run(dist.all_reduce, pair, op=dist.ReduceOp.MIN)
        self._count(2 * 2)
        least, bad = pair.tolist()
        if bad:
            raise settled(ValueError("pgdfast: the least of the ranks' numbers was asked for, and one of them is NaN."))
        return least

    def same(self, t: torch.Tensor, source: int = 0) -> torch.Tensor:
        """One rank's values on all ranks, in place where `t` is contiguous: use what is returned. Words: (R - 1) / R n."""
        t = t.detach().contiguous()
        if t.numel():
            self._run(dist.broadcast, t, group_src=source)
            self._count(t.numel())
        return t

    def columns_of(self, J: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """From rows to columns: rank r gets columns P r / R to P (r + 1) / R of all ranks' rows, (sum of M_r, about P / R).

        J: this rank's rows, (M_r, P). sizes: every M_r, where it is known on all ranks. Words: (R - 1) / R M_r P.
        """
        sizes = sizes or self.sizes(len(J))
        cuts = [J.shape[1] * k // self.size for k in range(self.size + 1)]
        widths = [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        mine = widths[self.rank]
        sent = torch.cat([J.detach()[:, a:b].reshape(-1) for a, b in zip(cuts[:-1], cuts[1:], strict=True)])
        columns = J.new_empty((sum(sizes), mine), requires_grad=False)
        self._run(
            dist.all_to_all_single, columns.view(-1), sent, [mine * count for count in sizes], [w * len(J) for w in widths]
        )
        self._count(J.numel())
        return columns

    # --- errors -----------------------------------------------------------------------------------------------------------

    def settle(self, error: BaseException | None = None, buffer: torch.Tensor | None = None) -> None:
        """End a local section: return where no rank has an error, else raise the same error on all ranks.

        The message names the rank, and where it can be made from a message the error has the type that it has there; else it
        is a RuntimeError. On the rank that failed its own error is the cause. buffer: numbers to be summed in the same go, with
        a last one for this. Cost: a sum of one number where nothing failed.
        Raises RuntimeError at once, on this rank, where another has gone: there is nobody to settle with.
        """
        if isinstance(error, LostRank) or getattr(error, "pgdfast_settled", False):
            raise error
        if self._lost is not None:
            raise self._lost from error
        if self.size == 1 and error is not None:
            raise error
        failed = torch.zeros(1, dtype=torch.int64, device=self.device) if buffer is None else buffer
        failed[-1] = error is not None
        self.total(failed)
        if not failed[-1].item():
            return
        agreed = combined(self.objects(described(error)))
        agreed.pgdfast_settled = True
        if error is not None and not isinstance(error, Exception):   # Ctrl-C, exit: as they came
            error.pgdfast_settled = True
            raise error
        raise agreed from error

    def left(self, error: BaseException) -> None:
        """Say that a step ended with this error; the next one waits for all ranks first, unless all are known to have it.

        Where the others have it too, since it follows from what all know, they come as well. Else they wait elsewhere, and all
        end with the time-out in place of taking each other's numbers for something else.
        """
        self._unsure = not getattr(error, "pgdfast_settled", False)

    def section(self) -> _Section:
        """A local section: `with group.section(): ...` settles what the block raises, or that it raised nothing.

        The block holds no collective of this group but inside sections of its own.
        """
        return _Section(self)

    def adding(self, shape: tuple, dtype: torch.dtype, device: torch.device) -> _Sum:
        """A local section and the sum of what it computes, in one collective.

        `with group.adding(...) as t: ...`: t holds zeros that the block adds to, and after it the sum over all ranks.
        """
        return _Sum(self, shape, dtype, device)

    # --- checks -----------------------------------------------------------------------------------------------------------

    def check(self, params: list[torch.Tensor]) -> None:
        """Raise ValueError on all ranks unless the backend moves these parameters and all have equal shapes and dtypes."""
        error = self._use_device_of(params)
        told = self.objects((error, [(tuple(p.shape), str(p.dtype).removeprefix("torch.")) for p in params]))
        for text, _ in told:
            if text:
                raise settled(ValueError(text))
        _compare("shapes and dtypes of parameters", [each for _, each in told], "Build the same model on every rank.")

    def agree(self, name: str, value: Any) -> None:
        """Raise ValueError on all ranks unless they have the same value (compared with ==); name: what it is, in the plural.

        Of dicts the error has the entries that differ.
        """
        values = self.objects(value)
        if isinstance(value, dict):
            differing = [key for key in values[0] if any(other.get(key) != values[0][key] for other in values)]
            values = [{key: other.get(key) for key in differing} for other in values]
        _compare(name, values, "Give every rank the same.")

    # --- below ------------------------------------------------------------------------------------------------------------

    def _use_device_of(self, params: list[torch.Tensor]) -> str:
        """Have this group's small numbers where the parameters are; why that cannot be, or ""."""
        device = params[0].device
        if device.type in _backends(self.group):
            self.device = device
            return ""
        return (
            f"pgdfast.LM: the parameters of rank {self.rank} are on {device} and the process group has the backend "
            f"{dist.get_backend(self.group)}; gloo moves CPU tensors and nccl moves CUDA tensors. Call init_process_group "
            "without a backend to have both, or move the model."
        )

    def _count(self, numbers: float) -> None:
        self.words += numbers * (self.size - 1) / self.size

    def _run(self, collective, *arguments, **options) -> None:
        """Call a collective; one that fails has lost a rank, and none is called after it."""
        if self._lost is not None:
            raise self._lost
        try:
            collective(*arguments, group=self.group, **options)
        except RuntimeError as error:
            self._lost = LostRank(_gone(self.rank, error))
            raise self._lost from error


def _gone(rank: int, error: BaseException) -> str:
    reason = str(error).split("\n")[0].split(". ")[0]
    return (
        "pgdfast.LM: another rank of the process group has gone, or did not answer within the group's time-out (rank "
        f"{rank} heard: {reason}). This rank undid its step, but others may have finished it: restart all ranks from the last "
        "checkpoint."
    )


def _check_group(group) -> None:
    start = (
        "start the processes by torchrun (python -m torch.distributed.run --nproc-per-node 2 script.py) and call "
        "torch.distributed.init_process_group() in each"
    )
    if not dist.is_available():
        raise ValueError("pgdfast.LM: process_group was given, and this PyTorch was built without torch.distributed.")
    if not dist.is_initialized():
        raise ValueError(f"pgdfast.LM: process_group was given, and torch.distributed is not initialised; {start}.")
    if group is dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0:
        raise ValueError(
            "pgdfast.LM: this process does not belong to the process group that it was given; make the LM on the group's "
            "ranks alone."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"pgdfast.LM: process_group is a {type(group).__name__}; it must be a group of torch.distributed, such as "
            "torch.distributed.group.WORLD, one of new_group(), or mesh.get_group()."
        )


def _backends(group) -> dict[str, str]:
    """{"cpu": "gloo", "cuda": "nccl"}: the backend of each device type that one moves tensors of."""
    config = dist.get_backend_config(group)   # "cpu:gloo,cuda:nccl", whatever was asked for
    pairs = dict(part.split(":") for part in config.split(","))
    moves = {"gloo": ("cpu",), "nccl": ("cuda",)}   # gloo would move CUDA tensors by way of the host
    return {device: backend for device, backend in pairs.items() if device in moves.get(backend, (device,))}


def _device_of(group) -> torch.device:
    """Where this group's small numbers are, until parameters say."""
    return torch.device("cpu" if "cpu" in _backends(group) else "cuda")


@torch.no_grad()
def _checksum(params: list[torch.Tensor]) -> torch.Tensor:
    """A sum modulo 2^64 of the parameters' bits times odd numbers, 0-dim int64.

    A difference in one number never goes unseen; of several together one in 2^64 does.
    """
    total, first = torch.zeros((), dtype=torch.int64, device=params[0].device), 0
    for p in params:
        real = torch.view_as_real(p.detach().resolve_conj()) if p.is_complex() else p.detach()
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
        for bits in real.contiguous().reshape(-1).view(whole).split(_AT_ONCE):
            places = torch.arange(first, first + bits.numel(), dtype=torch.int64, device=bits.device)
            total += (bits * (places.mul_(_MIX).add_(1))).sum()
            first += bits.numel()
    return total


def _same_bits(sums: list[int]) -> None:
    others = [r for r, number in enumerate(sums) if number != sums[0]]
    if others:
        raise settled(ValueError(
            f"pgdfast.LM: the parameters of {ranks_named(others)} differ from those of rank 0; all ranks must hold the same "
            "bits, since every rank takes the same step. Seed all ranks alike before the model is built, load the same "
            "checkpoint on all of them, or copy rank 0's: for p in params: torch.distributed.broadcast(p.data, 0). Nothing was "
            "changed."
        ))


def _compare(name: str, values: list, advice: str) -> None:
    others = [r for r, value in enumerate(values) if not value == values[0]]
    if others:
        differing, other = ranks_named(others), _brief(values[others[0]])
        raise settled(ValueError(
            f"pgdfast.LM: all ranks must have equal {name}; rank 0 has {_brief(values[0])}, {differing}: {other}. {advice}"
        ))


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def chosen_group(process_group) -> Alone | Ranks:
    """What LM's option process_group means: None, a group of torch.distributed, or Ranks with options of their own."""
    if process_group is None or isinstance(process_group, Ranks):
        return process_group or Alone()
    return Ranks(process_group)
