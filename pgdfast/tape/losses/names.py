"""What users wrote, for messages: the tape names operations by their autograd nodes."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

_WRITTEN = {
    "Add": "a sum", "Sub": "a difference", "Rsub": "a difference", "Mul": "a product", "Div": "a quotient",
    "Neg": "a minus sign",
    "Pow": "a power", "Mm": "a product of matrices", "Bmm": "a product of matrices", "Mv": "a product of matrices",
    "Addmm": "a linear layer", "Select": "indexing", "Slice": "indexing", "Index": "indexing", "T": "a transpose",
    "Permute": "a transpose", "Transpose": "a transpose", "View": "a reshape", "UnsafeView": "a reshape",
    "AccumulateGrad": "a bare parameter", "CopySlices": "an in-place write", "LinalgVectorNorm": "torch.linalg.norm",
    "Dist": "torch.dist", "Split": "torch.split", "SplitWithSizes": "torch.split", "Unbind": "unpacking",
}
_LINEAR_TERM = (
    "a term that is linear in what the model computes has no curvature to step by: compare with a target and square the "
    "difference, or return the difference as a residual"
)
_ADVICE = {
    "Addmm": _LINEAR_TERM, "Mm": _LINEAR_TERM, "AccumulateGrad": _LINEAR_TERM,
    "Where": "a quantile loss beside other terms is torch.maximum(q * e, (q - 1) * e), which keeps e on the tape",
    "Max": "torch.max over many numbers is no sum: return these as residuals, or use torch.logsumexp",
    "Min": "torch.min over many numbers is no sum: return these as residuals",
}


def written(name: str) -> str:
    """An operation as a user knows it, with the name of its node."""
    bare = re.sub(r"Backward\d*$", "", name.rsplit("::", 1)[-1])
    known = _WRITTEN.get(bare)
    if known is None:
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", bare).lower()
        place = next((text for module, text in ((torch, "torch"), (F, "F")) if hasattr(module, snake)), None)
        if place is None:
            return name
        known = f"{place}.{snake}"
    return f"{known} ({name})"


def leads_nowhere(name: str, above: tuple = ()) -> str:
    """Why a walk ended at an operation, and what to write instead. above: the names of the operations that it came by."""
    bare = re.sub(r"Backward\d*$", "", name.rsplit("::", 1)[-1])
    chosen = any(n.startswith("Where") for n in above) and _ADVICE.get(bare) is _LINEAR_TERM
    advice = _ADVICE.get("Where" if chosen else bare)
    text = f"{written(name)} leads to no sum of squares, no cross-entropy and no other convex function"
    return text if advice is None else f"{text}; {advice}"
