"""Pointwise operations without a formula of their own here: a node's backward, given ones, is the derivative.

So a new operation is one name. It must be pointwise in every input: element i of an output may depend, of each input
broadcast to the output's shape, on element i alone.
"""

from __future__ import annotations

import torch

from .table import OwnBackward, rule

UNARY = """
    AcosBackward0 AcoshBackward0 AngleBackward0 AsinBackward0 AsinhBackward0 AtanhBackward0 BernoulliBackward0 CeilBackward0
    CopysignBackward1 Deg2RadBackward0 DigammaBackward0 DivBackward3 ErfcBackward0 ErfinvBackward0 Exp2Backward0
    FloorBackward0 FmodBackward0 FracBackward0 FrexpBackward0 HardshrinkBackward0 HardswishBackward0 I0Backward0
    IndexFillBackward0 LgammaBackward0 Log10Backward0 LogitBackward0 MvlgammaBackward0 NanToNumBackward0 NegViewBackward0
    PolygammaBackward0 Rad2DegBackward0 RemainderBackward0 RoundBackward0 RoundBackward1 RreluWithNoiseBackward0
    ScatterBackward1 SignBackward0 SincBackward0 SoftshrinkBackward0 SpecialEntrBackward0 SpecialErfcxBackward0
    SpecialI0EBackward0 SpecialI1Backward0 SpecialI1EBackward0 SpecialLogNdtrBackward0 SpecialNdtriBackward0
    SpecialXlog1PyBackward1 SpecialXlog1PyBackward2 SpecialZetaBackward1 ThresholdBackward0 TruncBackward0 XlogyBackward1
    XlogyBackward2 ZeroBackward0
"""
OF_SEVERAL = """
    AddcdivBackward0 Atan2Backward0 ClampBackward0 ClampMaxBackward1 ClampMinBackward1 CopysignBackward0 DivBackward2
    FmaxBackward0 FminBackward0 FmodBackward1 HypotBackward0 IgammaBackward0 IgammacBackward0 LdexpBackward0 LerpBackward0
    LerpBackward1 Logaddexp2Backward0 LogaddexpBackward0 PreluKernelBackward0 RemainderBackward1 SpecialXlog1PyBackward0
    SpecialZetaBackward0 XlogyBackward0
"""
# Functions of a gradient and an input, which nested autograd.grad(..., create_graph=True) leaves on the tape.
OF_GRADIENTS = """
    HardshrinkBackwardBackward0 HardswishBackwardBackward0 NativeDropoutBackwardBackward0 PreluKernelBackwardBackward0
    RreluWithNoiseBackwardBackward0 SoftshrinkBackwardBackward0
"""


@rule(*UNARY.split(), *OF_SEVERAL.split(), *OF_GRADIENTS.split(), own=True, used=True)
def pointwise(op, backward: OwnBackward, used):
    for out in used:
        gradients = backward(backward.ones(out), out)
        for i, needed in enumerate(op.needs):
            if needed:
                op.scale(i, coefficient(gradients[i], backward, out), out=out)


def coefficient(gradient: torch.Tensor | None, backward: OwnBackward, out: int = 0) -> torch.Tensor:
    """A gradient at an output's shape, in a layout that depends on nothing else."""
    like = backward.outputs[out]
    if gradient is None:
        return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)
    return gradient.expand(tuple(like.shape)).contiguous()
