"""What a user is told where a closure's Jacobian comes from autograd."""

from __future__ import annotations

import os
import sys

import torch


def depth_of_caller() -> int:
    """The stacklevel, for a warning in the calling function, of the first frame outside pgdfast and torch."""
    own = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__))
    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_code.co_filename.startswith(own):
        frame, depth = frame.f_back, depth + 1
    return depth
