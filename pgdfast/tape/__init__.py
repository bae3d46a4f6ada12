"""From the result of a closure to a linear program: the autograd tape read as the linearization."""

from . import members
from .losses import Form, UnrecognizedLoss
from .program import Program
from .trace import CompiledTape, Trace, Tracer

__all__ = ["CompiledTape", "Form", "Program", "Trace", "Tracer", "UnrecognizedLoss", "members"]
