"""Many dampings against one."""

import pytest

from .bounds import dampings_bounds
from .dampings import CASES, MANY, ONE, measure, title
from .interleave import Recorded
from .tables import ROUNDS, chosen, judge, results

recorded = Recorded()
pytestmark = pytest.mark.benchmark(timer=recorded)
CHOSEN = chosen(["dampings"]) and CASES


@pytest.fixture
def measured(request):
    """One problem and solver, the rows timed in turn."""
    found = results(request.config)
    return found.once(found.problems, title(request.param), lambda: measure(request.param, max(3, ROUNDS // 2)))


@pytest.mark.parametrize(("measured", "row"), [(case, row) for case in CHOSEN for row in (ONE, MANY)], indirect=["measured"])
def test_time(benchmark, measured, row):
    benchmark.group = measured.title
    recorded.hand_over(benchmark, measured.timing(row).best)
    if row in measured.errors:
        error, allowed = measured.errors[row]
        if not error <= allowed:
            pytest.fail(f"{row} are off by {error:.1e} relative, more than {allowed:.1e}, in {measured.title}.", pytrace=False)


@pytest.mark.parametrize(
    ("measured", "bound"), [(case, bound) for case in CHOSEN for bound in dampings_bounds(title(case))], indirect=["measured"],
    ids=[f"{bound.section}-{bound.claim}" for case in CHOSEN for bound in dampings_bounds(title(case))])
def test_bound(request, benchmark, measured, bound):
    recorded.hand_over(benchmark, [0.0])
    judge(request.config, bound, measured)
