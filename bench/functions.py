"""The problems' outputs as functions of one flat parameter vector, for torch.func."""

import warnings

import torch
from torch.func import functional_call, linearize, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot


class Outputs:
    """theta (P,) -> what the network makes of the problem's inputs; `rows(theta, x)` of one input."""

    def __init__(self, problem, dtype=torch.float32):
        self.problem = problem
        self.model = problem.model(dtype)
        self.x, self.y, *_ = problem.data(dtype)
        named = dict(self.model.named_parameters())
        self._names, self._shapes = list(named), [p.shape for p in named.values()]
        self.start = torch.cat([p.detach().reshape(-1) for p in named.values()])

    def split(self, theta):
        """{name: parameter}, views of theta."""
        parts = theta.split([shape.numel() for shape in self._shapes])
        return {name: part.view(shape) for name, part, shape in zip(self._names, parts, self._shapes, strict=True)}

    def __call__(self, theta):
        return functional_call(self.model, self.split(theta), (self.x,))

    def linearized(self):
        """(outputs, targets, v -> J v, u -> J^T u) at the initial parameters, of the outputs alone."""
        # Forward mode has no rule for the fused attention; fx warns of attributes that it adds itself.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            z, forward = linearize(self, self.start)
            _, backward = vjp(self, self.start)
        return z, self.y, forward, lambda u: backward(u)[0]


def curvature(problem, z, y):
    """(t -> H t, gradient) of the loss in its outputs z, by the problem's loss."""
    if problem.entropy:
        p = z.softmax(1)
        return lambda t: p * (t - (p * t).sum(1, keepdim=True)) / len(z), (p - one_hot(y, z.shape[1])) / len(z)
    square = problem.scale**2
    return lambda t: square * t, square * (z - y)
