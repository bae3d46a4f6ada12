"""Our step and those that users have today, each with its best settings for speed and the same work to do.

A contender is made from a problem and has `step()`, `reset()` to its first parameters, and `exact`: "" for steps that solve
nothing, else how truth.Truth.step damps, "identity" for theta - lr delta with (mu I + J^T J) delta = J^T r. The lr is small,
as in the paper's flows, since whole steps at a constant damping can diverge. A contender that cannot run here raises Missing
with what to install. `problems` names those that it is timed on.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings

import torch
from torch.func import functional_call, hessian, jacrev, vmap

import pgdfast

from .interleave import THREADS
from .problems import as_loss
from .truth import flat

CG_STEPS = 10   # CG iterations of a step on F


class Missing(Exception):
    """A peer is not installed."""


def need(module, package):
    """Import an optional module; raises Missing where it is not installed or does not load."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not installed ({error}); see bench/requirements-peers.txt") from None


class Contender:
    """An optimizer over the parameters of a model of its own."""

    exact = "identity"
    threads = THREADS

    def __init__(self, problem, lr=1e-2, dtype=torch.float32):
        self.problem, self.lr = problem, lr
        self.model = problem.model(dtype)
        self.closure = problem.closure(self.model)
        self.params = list(self.model.parameters())
        self._start = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def reset(self):
        for p, value in zip(self.params, self._start, strict=True):
            p.copy_(value)

    def moved(self):
        """The first parameters less the present ones, (P,) float64: after one step with lr=1 the step delta."""
        return flat(self._start) - flat(self.params)

    def taken(self):
        """The step delta of one call, (P,) float64; made with lr=1."""
        self.reset()
        self.step()
        return self.moved()


class LM(Contender):
    """pgdfast.LM as the paper's plain LM: constant damping, the exact solve that the problem names."""

    name, problems = "LM step", "ABCDEFG"

    def __init__(self, problem, lr=1e-2):
        super().__init__(problem, lr)
        self.exact = "" if problem.solver == "cg" else "identity"
        self.optimizer = pgdfast.LM(self.params, lr=lr, damping=problem.damping, damping_rule="constant",
                                    solver=problem.solver, cg=pgdfast.CG(CG_STEPS, 1e-6))

    def step(self):
        self.optimizer.step(self.closure)


class Adam(Contender):
    """torch.optim.Adam, eager, with its default choice of implementation."""

    name, problems, exact, options = "Adam step", "ABCDEFG", "", {}

    def __init__(self, problem, lr=1e-2):
        super().__init__(problem, lr)
        self._optimizer = torch.optim.Adam(self.params, lr=lr, **self.options)

    def step(self):
        self._optimizer.zero_grad()
        as_loss(self.closure()).backward()
        self._optimizer.step()


class FusedAdam(Adam):
    """torch.optim.Adam(fused=True)."""

    name, options = "Adam step, fused", {"fused": True}


class TorchLevenbergMarquardt(Contender):
    """torch-levenberg-marquardt: Cholesky, vmap, one try that is kept untested, constant damping."""

    name, problems = "torch-levenberg-marquardt step", "AB"

    def __init__(self, problem, lr=1e-2):
        training, damping = _training_module("training"), _training_module("damping")
        super().__init__(problem, lr)
        self._data = problem.data()
        # It solves (J J^T / N + mu) with J of the plain residuals, where mse_loss has the factor 2 / N.
        constant = damping.StandardDampingStrategy(starting_value=problem.damping / 2, dec_factor=1.0, inc_factor=1.0)
        self._module = training.LevenbergMarquardtModule(
            self.model, damping_strategy=constant, learning_rate=lr, attempts_per_step=0, solve_method="cholesky"
        )

    def step(self):
        self._module.training_step(*self._data)


class TorchLevenbergMarquardtAsShipped(TorchLevenbergMarquardt):
    """The same library as its own examples use it: adaptive damping, tries that are judged and undone; Cholesky.

    Its steps differ from the plain LM step, so only their time is compared.
    """

    name, exact = "torch-levenberg-marquardt as shipped", ""

    def __init__(self, problem, lr=1e-2):
        super().__init__(problem, lr)
        training = _training_module("training")
        self._module = training.LevenbergMarquardtModule(self.model, learning_rate=lr, solve_method="cholesky")

    def reset(self):
        super().reset()
        self._module.reset()   # its damping


class PyPose(Contender):
    """pypose.optim.LM with Cholesky and constant damping; it always solves in parameters, and takes the whole step."""

    name, problems, exact = "PyPose LM step", "A", "pypose"

    def __init__(self, problem, lr=1e-2):
        optim = need("pypose.optim", "pypose")
        super().__init__(problem, lr)
        self._data = problem.data()
        self._optimizer = optim.LM(self.model, solver=optim.solver.Cholesky(), reject=0,
                                   strategy=optim.strategy.Constant(damping=problem.damping))

    def step(self):
        self._optimizer.__dict__.pop("loss", None)   # the loss of the last step, which a reset makes wrong
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self._optimizer.step(*self._data)
        if "failed" in said.getvalue():
            raise ArithmeticError(f"pypose: {said.getvalue().strip()}")


class TorchFunc(Contender):
    """The same step by hand with torch.func: the Jacobian by vmap, then the dual or primal Cholesky."""

    name, problems = "torch.func step", "ABCDEG"

    def __init__(self, problem, lr=1e-2, dtype=torch.float32):
        super().__init__(problem, lr, dtype)
        self._named = dict(self.model.named_parameters())
        self._data = problem.data(dtype)
        self._rows = self._physics_rows() if problem.name == "C" else self._rows_of(lambda x: x)

    def _rows_of(self, inputs):
        def output(params, x):
            return functional_call(self.model, params, (x.unsqueeze(0),)).squeeze(0)

        jacobian = vmap(jacrev(output), (None, 0))

        def rows():
            x, y = self._data
            return [(jacobian(self._named, x), self.model(x) - y)]

        return rows

    def _physics_rows(self):
        """Of -Lap u = f and of u on the boundary."""
        interior, boundary, f = self._data

        def value(params, x):
            return functional_call(self.model, params, (x.unsqueeze(0),))[0, 0]

        def laplacian(params, x):
            return hessian(value, argnums=1)(params, x).diagonal().sum()

        parts = [(interior, laplacian, f[:, 0]), (boundary, value, 0.0)]
        both = [(x, vmap(jacrev(u), (None, 0)), vmap(u, (None, 0)), shift) for x, u, shift in parts]
        return lambda: [(jacobian(self._named, x), u(self._named, x) + shift) for x, jacobian, u, shift in both]

    @torch.no_grad()
    def step(self):
        J, r = [], []
        for parts, residual in self._rows():
            M = residual.numel()
            J.append(torch.cat([parts[name].reshape(M, -1) for name in self._named], 1))
            r.append(residual.reshape(M, 1))
        J, r = (part[0] if len(part) == 1 else torch.cat(part) for part in (J, r))
        if self.problem.scale != 1:
            J, r = J.mul_(self.problem.scale), r.mul_(self.problem.scale)
        if self.problem.solver == "dual":
            delta = J.T @ _solve(J @ J.T, self.problem.damping, r)
        else:
            delta = _solve(J.T @ J, self.problem.damping, J.T @ r)
        for p, d in zip(self.params, delta.split([p.numel() for p in self.params]), strict=True):
            p.sub_(d.view_as(p), alpha=self.lr)


def _solve(matrix, damping, b):
    matrix.diagonal().add_(damping)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(b, factor)


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
