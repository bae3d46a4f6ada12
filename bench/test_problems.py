"""Steps, products and parts on the paper's problems, timed in turn; results checked, and the bounds judged."""

import pytest

from .bounds import BOUNDS
from .interleave import Recorded
from .measure import measure, row_names
from .problems import PROBLEMS
from .tables import ROUNDS, chosen, judge, results

recorded = Recorded()
pytestmark = [
    pytest.mark.benchmark(timer=recorded),
    pytest.mark.filterwarnings("ignore"),          # peers warn of what is theirs
    pytest.mark.filterwarnings("error:pgdfast"),
]
CHOSEN = chosen(PROBLEMS)


@pytest.fixture
def measured(request):
    """One problem, all rows timed in turn."""
    found = results(request.config)
    return found.once(found.problems, request.param, lambda: measure(PROBLEMS[request.param], ROUNDS))


@pytest.mark.parametrize(
    ("measured", "row"), [(name, row) for name in CHOSEN for row in row_names(PROBLEMS[name])], indirect=["measured"])
def test_time(benchmark, measured, row):
    if row in measured.missing:
        pytest.skip(measured.missing[row])
    timing = measured.timing(row)
    benchmark.group = measured.title
    benchmark.extra_info.update(threads=timing.threads, gflops=timing.gflops, over_ours=vars(measured.over_ours(row)))
    recorded.hand_over(benchmark, timing.best)
    if row in measured.errors:
        error, allowed = measured.errors[row]
        if not error <= allowed:
            pytest.fail(f"{row} is off by {error:.1e} relative, more than {allowed:.1e}, in {measured.title}.", pytrace=False)


@pytest.mark.parametrize(
    ("measured", "bound"), [(bound.section, bound) for bound in BOUNDS if bound.section in CHOSEN], indirect=["measured"],
    ids=[f"{bound.section}-{bound.claim}" for bound in BOUNDS if bound.section in CHOSEN])
def test_bound(request, benchmark, measured, bound):
    recorded.hand_over(benchmark, [0.0])
    judge(request.config, bound, measured)
