"""Parameters that LM cannot move: those of which a process holds a part, or which are no tensors of its own."""

from __future__ import annotations

import sys

import torch


def refuse_distributed(params: list[torch.Tensor], where: str = "LM") -> None:
    """Raise ValueError for DTensors (FSDP2, tensor parallelism) and for parameters that FullyShardedDataParallel flattens.

    A step reads and moves whole parameters in every process, and FSDP's modules compute with others than they show.
    """
    module = sys.modules.get("torch.distributed.tensor")   # nobody has a DTensor without it
    for number, p in enumerate(params):
        if module is not None and isinstance(p, module.DTensor):
            places = ", ".join(map(str, p.placements))
            what = f"is a DTensor with the placements ({places})"
            whole = all(place.is_replicate() for place in p.placements)
        elif getattr(p, "_fsdp_flattened", False):
            what, whole = "belongs to FullyShardedDataParallel", False
        else:
            continue
        advice = (
            "replace it by torch.nn.Parameter(p.to_local())" if whole else
            "build the model without fully_shard, FullyShardedDataParallel and parallelize_module (DistributedDataParallel is "
            "fine)"
        )
        raise ValueError(
            f"pgdfast.{where}: parameter {number}, of shape {tuple(p.shape)}, {what}, and LM needs every parameter as a plain "
            f"tensor, whole in every process: it spreads the rows over the processes. Please {advice}, and pass process_group=."
        )
