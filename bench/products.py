"""J^T J v by those who offer it: for a cross-entropy G v with the loss's Hessian between.

A contender is made from a problem and a vector v (P,), and called for one product. What can be done once for many products
is done when it is made.
"""

import contextlib
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .functions import Outputs, curvature
from .interleave import THREADS
from .peers import need


class Product:
    """J^T J v (G v of a cross-entropy) from what was linearized once."""

    threads, share = THREADS, 1

    def __init__(self, problem, v):
        self.problem, self.v = problem, v

    def value(self):
        """One product, to be checked."""
        return self()


class TorchFuncProduct(Product):
    """torch.func.linearize for J v, torch.func.vjp for J^T u."""

    name, problems = "torch.func J^T J v", "ABDEFG"

    def __init__(self, problem, v):
        super().__init__(problem, v)
        outputs = Outputs(problem)
        z, y, self._forward, self._backward = outputs.linearized()
        self._weigh, _ = curvature(problem, z, y)

    def __call__(self):
        return self._backward(self._weigh(self._forward(self.v)))


class Curvlinops(Product):
    """curvlinops.GGNLinearOperator; every product runs the network again."""

    name, problems, compiled = "curvlinops J^T J v", "ABFG", False

    def __init__(self, problem, v):
        curvlinops = need("curvlinops", "curvlinops-for-pytorch")
        super().__init__(problem, v)
        model = problem.model()
        loss = torch.nn.CrossEntropyLoss() if problem.entropy else torch.nn.MSELoss()
        x, y = problem.data()
        operator = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(x, y)], check_deterministic=False)

        def product(v):
            with sdpa_kernel(SDPBackend.MATH) if problem.entropy else contextlib.nullcontext():   # as in functions.py
                return operator @ v

        self._run = torch.compile(product) if self.compiled else product
        if self.compiled:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")   # inductor's own deprecations
                self()

    def __call__(self):
        return self._run(self.v)


class CompiledCurvlinops(Curvlinops):
    """The same under torch.compile."""

    name, problems, compiled = "curvlinops J^T J v, compiled", "AG", True
