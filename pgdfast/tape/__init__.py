"""From the result of a closure to a linear program: the autograd tape read as the linearization."""

from . import members
from .losses import Form, Share, UnrecognizedLoss
from .program import Program
from .reals import has_complex, real_gradient, real_size, real_views, shaped_as
from .trace import CompiledTape, Trace, Tracer

__all__ = [
    "CompiledTape", "Form", "Program", "Share", "Trace", "Tracer", "UnrecognizedLoss", "has_complex", "members",
    "real_gradient", "real_size", "real_views", "shaped_as",
]
