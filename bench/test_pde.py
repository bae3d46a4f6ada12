"""pgdfast.pde against nested autograd: the Laplacian, its gradient, an LM step."""

import pytest

from .bounds import pde_bounds
from .interleave import Recorded
from .parts import NESTED, NESTED_STEP, TAYLOR
from .pde import GRADIENT, NESTED_GRADIENT, NETWORKS, measure, title
from .peers import LM
from .tables import ROUNDS, chosen, judge, results

recorded = Recorded()
pytestmark = pytest.mark.benchmark(timer=recorded)
CHOSEN = chosen(["pde"]) and NETWORKS
ROWS = (LM.name, NESTED_STEP, TAYLOR, NESTED, GRADIENT, NESTED_GRADIENT)


@pytest.fixture
def measured(request):
    """One network, all rows timed in turn."""
    found = results(request.config)
    return found.once(found.problems, title(request.param), lambda: measure(request.param, max(3, ROUNDS // 2)))


@pytest.mark.parametrize(("measured", "row"), [(hidden, row) for hidden in CHOSEN for row in ROWS], indirect=["measured"])
def test_time(benchmark, measured, row):
    benchmark.group = measured.title
    recorded.hand_over(benchmark, measured.timing(row).best)
    if row in measured.errors:
        error, allowed = measured.errors[row]
        if not error <= allowed:
            pytest.fail(f"{row} is off by {error:.1e} relative, more than {allowed:.1e}, in {measured.title}.", pytrace=False)


@pytest.mark.parametrize(
    ("measured", "bound"), [(hidden, bound) for hidden in CHOSEN for bound in pde_bounds(title(hidden))], indirect=["measured"],
    ids=[f"{bound.section}-{bound.claim}" for hidden in CHOSEN for bound in pde_bounds(title(hidden))])
def test_bound(request, benchmark, measured, bound):
    recorded.hand_over(benchmark, [0.0])
    judge(request.config, bound, measured)
