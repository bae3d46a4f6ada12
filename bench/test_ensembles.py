"""Ensembles of task A's network, and of D's sweep, against their members one by one."""

import pytest

from .bounds import ENSEMBLE_BOUNDS
from .ensembles import RULE, RULE_SINGLES, SECTIONS
from .interleave import Recorded
from .parts import SINGLES
from .peers import LM
from .tables import ROUNDS, chosen, judge, results

recorded = Recorded()
pytestmark = pytest.mark.benchmark(timer=recorded)
CHOSEN = list(SECTIONS) if chosen(["ensembles"]) else []
ROWS = [(name, row) for name in CHOSEN for row in (LM.name, SINGLES, *((RULE, RULE_SINGLES) if name == CHOSEN[0] else ()))]
BOUNDS = [(bound.section, bound) for bound in ENSEMBLE_BOUNDS if CHOSEN]


@pytest.fixture
def measured(request):
    """One section, all rows timed in turn."""
    found = results(request.config)
    return found.once(found.problems, request.param, lambda: SECTIONS[request.param](max(3, ROUNDS // 4)))


@pytest.mark.parametrize(("measured", "row"), ROWS, indirect=["measured"])
def test_time(benchmark, measured, row):
    benchmark.group = measured.title
    recorded.hand_over(benchmark, measured.timing(row).best)
    if row in measured.errors:
        error, allowed = measured.errors[row]
        if not error <= allowed:
            pytest.fail(f"{row} is off by {error:.1e} relative, more than {allowed:.1e}, in {measured.title}.", pytrace=False)


@pytest.mark.parametrize(("measured", "bound"), BOUNDS, indirect=["measured"], ids=[name for name, _ in BOUNDS])
def test_bound(request, benchmark, measured, bound):
    recorded.hand_over(benchmark, [0.0])
    judge(request.config, bound, measured)
