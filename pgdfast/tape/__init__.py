"""From the result of a closure to a linear program: the autograd tape read as the linearisation."""

from . import members
from .losses import Form, UnrecognisedLoss
from .program import Program
from .trace import Trace, Tracer

__all__ = ["Form", "Program", "Trace", "Tracer", "UnrecognisedLoss", "members"]
