"""How cost grows with width, depth and the number of rows."""

import pytest

from .bounds import SLOPE_BOUNDS, wide_bounds
from .interleave import Recorded
from .peers import LM
from .sweeps import COMPILED, SWEEPS, measure, slopes
from .tables import ROUNDS, chosen, judge, results

recorded = Recorded()
pytestmark = [
    pytest.mark.benchmark(timer=recorded),
    pytest.mark.filterwarnings("ignore"),          # peers warn of what is theirs
    pytest.mark.filterwarnings("error:pgdfast"),
]
CHOSEN = chosen(["sweeps"]) and list(SWEEPS)
POINTS = [(sweep, size) for sweep in CHOSEN for size in SWEEPS[sweep][1]]
WIDE = [(("width", size), bound) for size in SWEEPS["width"][1] if CHOSEN
        for bound in wide_bounds(f"width {size}", size, size in COMPILED)]


@pytest.fixture
def measured(request):
    """One size of one sweep."""
    sweep, size = request.param
    found = results(request.config)
    found.once(found.sweeps.setdefault(sweep, {}), size, lambda: measure(sweep, size, max(3, ROUNDS // 4)))
    return found.sweeps[sweep][size]


@pytest.mark.parametrize("measured", POINTS, indirect=True, ids=lambda point: f"{point[0]}-{point[1]}")
def test_time(benchmark, measured):
    timing = measured.timing(LM.name)
    benchmark.group = f"{measured.title}, {measured.facts['network']}"
    benchmark.extra_info.update(medians_ms={name: 1e3 * row.median for name, row in measured.timings.items()})
    recorded.hand_over(benchmark, timing.best)


@pytest.mark.parametrize(("measured", "bound"), WIDE, indirect=["measured"],
                         ids=[f"{bound.section}-{bound.claim}" for _, bound in WIDE])
def test_bound(request, benchmark, measured, bound):
    recorded.hand_over(benchmark, [0.0])
    judge(request.config, bound, measured)


@pytest.mark.parametrize("bound", SLOPE_BOUNDS if CHOSEN else [], ids=lambda bound: bound.claim)
def test_slope(request, benchmark, bound):
    """The exponent of the LM step's time."""
    points = results(request.config).sweeps.get(bound.section, {})
    if set(points) != set(SWEEPS[bound.section][1]):
        pytest.skip("not all sizes were timed")
    found = slopes(bound.section, points, LM.name)
    results(request.config).fits[bound.section] = {
        what: f"{LM.name} grows with exponent {k:.2f} over sizes {', '.join(map(str, sizes))}"
        for what, (k, sizes) in found.items()}
    recorded.hand_over(benchmark, [0.0])
    judge(request.config, bound, found)
