"""Our step beside torch.optim.Adam's and one by hand with torch.func, and products with J, timed by pytest-benchmark.

Every test times real calls, on one thread, and checks the result of the last of them in float64. pytest-benchmark runs one row
after another, while the machine's speed drifts: ratios and bounds are judged by `python -m bench`, which runs all rows in turn.
"""

from dataclasses import replace
from functools import cache
from time import perf_counter

import pytest
import torch

from .measure import ALLOWED, ALLOWED_PRODUCT, SLOWEST, vector
from .parts import GGN, linearized
from .peers import CG_STEPS, LM, Adam, TorchFunc
from .problems import PROBLEMS, as_loss
from .products import TorchFuncProduct
from .truth import Truth, flat, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore"),          # torch.func warns of what is its own
    pytest.mark.filterwarnings("error:pgdfast"),
]
SECONDS = 0.5   # what the rounds of a row take, but for the slowest
# float32's eps times the condition of J^T J + mu, where that is above ALLOWED: what torch.func's steps may be off by.
ILL_CONDITIONED = {"C": 0.1, "G": 4e-4}


def cases(kinds):
    return [pytest.param(name, kind, id=f"{name}-{kind.name}") for name in PROBLEMS for kind in kinds if name in kind.problems]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def truth(name):
    """Products with J in float64."""
    return Truth(replace(PROBLEMS[name], reference=False))


@cache
def true_step(name):
    """The step in float64; of F ten CG iterations."""
    if name == "C":   # derivatives by its inputs, for which `truth` has no products: the Jacobian by hand
        return TorchFunc(PROBLEMS[name], 1.0, torch.float64).taken()
    return truth(name).by_cg(CG_STEPS if PROBLEMS[name].solver == "cg" else None)


def timed(benchmark, call, slow=False, reset=None):
    """Time a call, `reset` before each; the slow ones once."""
    if slow:
        return benchmark.pedantic(call, setup=reset)
    start = perf_counter()
    call()
    rounds = min(max(int(SECONDS / (perf_counter() - start)), 3), 200)
    return benchmark.pedantic(call, setup=reset, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize(("name", "kind"), cases([LM, TorchFunc]))
def test_step(benchmark, name, kind):
    benchmark.group = f"{name}: {PROBLEMS[name].what}: one step"
    contender = kind(PROBLEMS[name], lr=1.0)
    timed(benchmark, contender.step, (kind.name, name) in SLOWEST, contender.reset)
    assert relative_error(contender.moved(), true_step(name)) <= (ALLOWED if kind is LM else ILL_CONDITIONED.get(name, ALLOWED))


@pytest.mark.parametrize("name", PROBLEMS)
def test_adam(benchmark, name):
    """Its step divides by the size of each gradient entry, however small: the gradient is what is compared."""
    problem = PROBLEMS[name]
    benchmark.group = f"{name}: {problem.what}: one step"
    contender = Adam(problem)
    timed(benchmark, contender.step, reset=contender.reset)
    model = problem.model(torch.float64)
    expected = torch.autograd.grad(as_loss(problem.closure(model)()), list(model.parameters()))
    assert relative_error(flat(p.grad for p in contender.params), flat(expected)) <= ALLOWED_PRODUCT


class OurProduct:
    """Linearization.ggn."""

    name, problems = GGN, TorchFuncProduct.problems

    def __init__(self, problem, v):
        self._lin, self._v = linearized(problem, problem.model()), v

    def __call__(self):
        return self._lin.ggn(self._v)


@pytest.mark.parametrize(("name", "kind"), cases([OurProduct, TorchFuncProduct]))
def test_product(benchmark, name, kind):
    benchmark.group = f"{name}: {PROBLEMS[name].what}: J^T J v"
    v = vector(PROBLEMS[name])
    assert relative_error(timed(benchmark, kind(PROBLEMS[name], v)), truth(name).product(v)) <= ALLOWED_PRODUCT
