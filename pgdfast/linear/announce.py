"""What a user is told where a closure's Jacobian comes from autograd: which operation, at what cost, and what to do."""

from __future__ import annotations

import os
import re
import sys

import torch

REPORT = "report the closure as an issue of pgdfast"
_BACKWARD = re.compile(r"Backward\d*$")
_USUAL = {   # names of nodes that are far from what one writes
    "Trilinear": "nn.Bilinear / torch._trilinear",
    "Convolution": "torch.conv1d, conv2d or conv3d",
    "ConvolutionOverrideable": "torch.conv1d, conv2d or conv3d",
    "MkldnnConvolution": "torch.conv1d, conv2d or conv3d",
    "CudnnConvolution": "torch.conv1d, conv2d or conv3d",
    "MkldnnRnnLayer": "nn.LSTM",
    "CudnnRnn": "nn.RNN, nn.LSTM or nn.GRU",
    "ThnnFusedLstmCell": "nn.LSTMCell",
    "ThnnFusedGruCell": "nn.GRUCell",
    "NativeBatchNorm": "F.batch_norm",
    "CudnnBatchNorm": "F.batch_norm",
    "NativeGroupNorm": "F.group_norm",
    "NativeLayerNorm": "F.layer_norm",
    "NativeDropout": "F.dropout",
    "FftC2C": "torch.fft",
    "FftR2C": "torch.fft.rfft",
    "FftC2R": "torch.fft.irfft",
    "CopySlices": "an assignment into a part of a tensor",
    "IndexPutImpl": "an assignment into a part of a tensor",
    "IndexPut": "an assignment into a part of a tensor",
    "EmbeddingBag": "nn.EmbeddingBag",
    "UnsafeSplit": "torch.split or chunk",
    "Im2Col": "F.unfold",
    "Col2Im": "F.fold",
    "Cdist": "torch.cdist",
    "SparseMm": "torch.sparse.mm",
    "LinalgSolveEx": "torch.linalg.solve",
    "LinalgInvEx": "torch.linalg.inv",
    "LinalgLuFactorEx": "torch.linalg.lu_factor",
    "LinalgCholeskyEx": "torch.linalg.cholesky",
    "LinalgSvd": "torch.linalg.svd",
    "LinalgEigh": "torch.linalg.eigh",
    "LinalgQr": "torch.linalg.qr",
    "LinalgDet": "torch.linalg.det",
    "PixelShuffle": "F.pixel_shuffle",
    "MaxPool2DWithIndices": "F.max_pool2d",
    "MaxPool3DWithIndices": "F.max_pool3d",
    "AdaptiveAvgPool2D": "F.adaptive_avg_pool2d",
    "GridSampler2D": "F.grid_sample",
    "GridSampler3D": "F.grid_sample",
}
_FAMILIES = (("Linalg", "torch.linalg."), ("Special", "torch.special."), ("Upsample", "F.interpolate, "))


def called(name: str) -> str:
    """A node's name as a user would call its operation: `CumsumBackward0` is torch.cumsum."""
    stem = _BACKWARD.sub("", name)
    if stem in _USUAL:
        return f"{_USUAL[stem]} ({name})"
    if not re.fullmatch(r"[A-Z]\w*", stem) or stem == name:   # of C++ Functions, and what is not one operation
        return name
    for prefix, room in _FAMILIES:
        if stem.startswith(prefix) and stem != prefix:
            return f"{room}{_snake(stem.removeprefix(prefix))} ({name})"
    snake = _snake(stem)
    for room, home in (("torch", torch), ("F", torch.nn.functional), ("torch.Tensor", torch.Tensor)):
        if hasattr(home, snake) and not isinstance(getattr(home, snake), type):
            return f"{room}.{snake} ({name})"
    return f"the torch.autograd.Function {stem} ({name})" if name.endswith("Backward") else name


def _snake(stem: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", stem).lower()


def no_rule(operation: str, num_residuals: int, num_parameters: int) -> str:
    """The announcement of an operation without a rule: a node's name, or a phrase."""
    rows, columns = num_residuals, 2 * num_parameters
    what = "one for each residual" if rows <= columns else "two for each parameter"
    name = called(operation)
    plain = name.removesuffix(f" ({operation})")
    cure = f"Write {plain} with matrix products, indexing and elementwise functions, which have rules"
    if " " in operation:   # a phrase
        cure = "Do without it"
    return (
        f"pgdfast: no tape rule for {name}; this closure takes the slower double-backward form: about {min(rows, columns)} "
        f"backward passes a step ({what}, many in one call), or three per iteration with solver='cg'. {cure}, or {REPORT}."
    )


def rules_disagree(names: list[str], wrong: list[int], params) -> str:
    """The announcement of rules that autograd does not bear out."""
    suspects = ", ".join(called(name) for name in names[:6]) + (", ..." if len(names) > 6 else "")
    where = ""
    if wrong:
        shapes = ", ".join(f"{k} of shape {tuple(params[k].shape)}" for k in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        where = f" at parameter {shapes}"
    return (
        f"pgdfast: the tape rules disagree with autograd's own gradient of this closure{where}; the fault lies in one of "
        f"{suspects}. Its steps are taken by autograd alone from now on, which is right but slower. This is a fault of "
        f"pgdfast: please {REPORT}."
    )


def depth_of_caller() -> int:
    """The stacklevel, for a warning in the calling function, of the first frame outside pgdfast and torch."""
    own = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__))
    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_code.co_filename.startswith(own):
        frame, depth = frame.f_back, depth + 1
    return depth
