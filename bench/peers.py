"""Our step and those that users have today, each with its best settings for speed and the same work to do.

A contender is made from a problem and has `model`, `step()`, and `exact`: whether its step is theta - lr delta with
(mu I + J^T J) delta = J^T r. The lr is small, as in the paper's flows, since whole steps at a constant damping can
diverge. A contender that cannot run here raises Missing with what to install.
"""

import importlib
import importlib.util
import sys
import types

import torch
from torch.func import functional_call, jacrev, vmap

import pgdfast


class Missing(Exception):
    """A peer is not installed."""


class LM:
    """pgdfast.LM as the paper's plain LM: constant damping, the exact dual solve."""

    name, exact = "LM step", True

    def __init__(self, problem, lr=1e-2):
        self.model, self._closure = _setup(problem)
        self._optimizer = pgdfast.LM(
            self.model.parameters(), lr=lr, damping=problem.damping, damping_rule="constant", solver="dual"
        )

    def step(self):
        self._optimizer.step(self._closure)


class Adam:
    """torch.optim.Adam, eager, with its default choice of implementation."""

    name, exact = "Adam step", False

    def __init__(self, problem, lr=1e-2):
        self.model, self._closure = _setup(problem)
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)

    def step(self):
        self._optimizer.zero_grad()
        self._closure().backward()
        self._optimizer.step()


class TorchLevenbergMarquardt:
    """torch-levenberg-marquardt: Cholesky, vmap, one try that is kept untested, constant damping."""

    name, exact = "torch-levenberg-marquardt step", True

    def __init__(self, problem, lr=1e-2):
        training, damping = _training_module("training"), _training_module("damping")
        self.model, _ = _setup(problem)
        self._x, self._y = problem.data()
        # It solves (J J^T / N + mu) with J of the plain residuals, where mse_loss has the factor 2 / N.
        constant = damping.StandardDampingStrategy(starting_value=problem.damping / 2, dec_factor=1.0, inc_factor=1.0)
        self._module = training.LevenbergMarquardtModule(
            self.model, damping_strategy=constant, learning_rate=lr, attempts_per_step=0, solve_method="cholesky"
        )

    def step(self):
        self._module.training_step(self._x, self._y)


class TorchLevenbergMarquardtAsShipped(TorchLevenbergMarquardt):
    """The same library as its own examples use it: adaptive damping, tries that are judged and undone; Cholesky.

    Its steps differ from the plain LM step, so only their time is compared.
    """

    name, exact = "torch-levenberg-marquardt as shipped", False

    def __init__(self, problem, lr=1e-2):
        training = _training_module("training")
        self.model, _ = _setup(problem)
        self._x, self._y = problem.data()
        self._module = training.LevenbergMarquardtModule(self.model, learning_rate=lr, solve_method="cholesky")


class TorchFunc:
    """The same step by hand with torch.func: one Jacobian row per sample by vmap, then the dual Cholesky."""

    name, exact = "torch.func step", True

    def __init__(self, problem, lr=1e-2):
        if problem.widths[-1] != 1:
            raise Missing("the torch.func step is written for one output")
        self.model, _ = _setup(problem)
        self._x, self._y = problem.data()
        self._lr, self._damping, self._scale = lr, problem.damping, (2 / problem.residuals) ** 0.5
        self._params = dict(self.model.named_parameters())

        def output(params, x):
            return functional_call(self.model, params, (x.unsqueeze(0),)).squeeze(0)

        self._jacobian = vmap(jacrev(output), (None, 0))

    @torch.no_grad()
    def step(self):
        parts = self._jacobian(self._params, self._x)
        J = torch.cat([part.flatten(1) for part in parts.values()], 1).mul_(self._scale)
        r = (self.model(self._x) - self._y).mul_(self._scale)
        K = J @ J.T
        K.diagonal().add_(self._damping)
        factor, _ = torch.linalg.cholesky_ex(K)
        delta = J.T @ torch.cholesky_solve(r, factor)
        sizes = [p.numel() for p in self._params.values()]
        for p, d in zip(self._params.values(), delta.split(sizes), strict=True):
            p.sub_(d.view_as(p), alpha=self._lr)


CONTENDERS = (LM, Adam, TorchLevenbergMarquardt, TorchLevenbergMarquardtAsShipped, TorchFunc)


def _setup(problem):
    model = problem.model()
    return model, problem.closure(model)


def _training_module(name):
    """Import one module of torch_levenberg_marquardt.

    The package's __init__ also imports its PyTorch Lightning trainer, which no step needs and which need not be
    installed; an empty module in its place leaves the training code as it is.
    """
    package = "torch_levenberg_marquardt"
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise Missing("torch-levenberg-marquardt is not installed; see bench/requirements-peers.txt")
        module = types.ModuleType(package)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = module
    return importlib.import_module(f"{package}.{name}")
