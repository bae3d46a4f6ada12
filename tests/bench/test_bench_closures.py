"""Every closure of the corpus against its oracle, and that a wrong step is noticed. Nothing is timed."""

import bench_folder  # noqa: F401 - makes `bench` importable
import pytest
import torch

import pgdfast
from bench.closures import CASES, Case
from bench.closures.command import chosen_cases, line, summary, too_slow
from bench.closures.runner import BROKEN, EXPECTED, FALLBACK, RAISES, RIGHT, SEPARATED, WRONG, Outcome, judge, look

ROWS, STEPS = 16, 2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("label", CASES)
def test_closure(label):
    outcome = judge(CASES[label], ROWS, STEPS)
    wanted = (RIGHT,) if CASES[label].raises is None else (RIGHT, EXPECTED) if CASES[label].either else (EXPECTED,)
    assert outcome.verdict in wanted, f"{outcome.verdict}: {outcome.message}"


def test_corpus_is_large():
    assert len(CASES) >= 220


def example(make, **expected):
    return Case("examples", "example", make, **expected)


def regression(g):
    net = g.net(2, 5, 1)
    d = g.batch(x=(g.n, 2), y=(g.n, 1))
    return g.fit(net, net, d)


def hooked(g):
    net = g.net(2, 5, 1)
    net[0].weight.register_hook(lambda gradient: 2 * gradient)
    d = g.batch(x=(g.n, 2))
    return g.residuals(net, lambda: net(d.x))


def mistaken(change):
    """A step of LM whose direction or damping is changed."""
    def make_step(problem, mu):
        optimizer = pgdfast.LM(problem.params, damping=lambda k: mu[0] * change.get("mu", 1), damping_rule="constant",
                               lr=change.get("lr", 1.0))
        return lambda: optimizer.step(problem.closure)

    return make_step


@pytest.mark.parametrize("change", [{"mu": 1.001}, {"lr": 1 + 1e-5}, {"lr": 0.0}, {"mu": 1e3}])
def test_wrong_step_is_noticed(change):
    outcome = judge(example(regression), ROWS, STEPS, mistaken(change))
    assert outcome.verdict == WRONG and "off" in outcome.message
    assert judge(example(regression), ROWS, STEPS, mistaken({})).verdict == RIGHT


def test_frozen_data_are_noticed():
    """A step that goes on with the data of the first one."""
    def make_step(problem, mu):
        d = problem.maker.data
        x, y = d.x, d.y
        optimizer = pgdfast.LM(problem.params, damping=lambda k: mu[0], damping_rule="constant")

        def step():
            d.x, d.y = x, y
            return optimizer.step(problem.closure)

        return step

    assert judge(example(regression), ROWS, STEPS, make_step).verdict == WRONG


@pytest.mark.parametrize("error", [1e-4, 1e-8])
def test_contradictory_case_is_noticed(error):
    def make(g):
        net = g.net(2, 5, 1)
        d = g.batch(x=(g.n, 2))
        return g.problem(net, lambda: net(d.x), lambda: net(d.x) * (1 + error))

    assert judge(example(make), ROWS, STEPS).verdict == BROKEN


def test_raising_is_judged():
    def refused(g):
        net = g.net(2, 5, 1)
        d = g.batch(x=(g.n, 2))
        return g.problem(net, lambda: -net(d.x).square().sum(), lambda: net(d.x), lambda z: -z.square().sum())

    assert judge(example(refused), ROWS, STEPS).verdict == RAISES
    assert judge(example(refused, raises="negative weight"), ROWS, STEPS).verdict == EXPECTED
    assert judge(example(refused, raises="something else"), ROWS, STEPS).verdict == RAISES
    assert judge(example(regression, raises="anything"), ROWS, STEPS).verdict == WRONG
    assert judge(example(regression, raises="anything", either=True), ROWS, STEPS).verdict == RIGHT


def test_paths_and_bounds():
    outcome = Outcome("recurrent/x", RIGHT)
    look(example(regression), outcome, ROWS)
    assert outcome.path == SEPARATED
    look(example(hooked), outcome, ROWS)
    assert outcome.path == FALLBACK and "hook" in outcome.note
    outcome.lm, outcome.path = 1.0, SEPARATED
    for label, adam, hand, slow in (("recurrent/x", 9.0, 1.1, ""), ("recurrent/x", 11.0, 1.0, "Adam"),
                                    ("pinn/x", 7.0, 1.0, "Adam"),
                                    ("pinn/x", 5.0, 1.3, "hand"), ("pinn/x", 5.0, None, "")):
        outcome.label, outcome.over_adam, outcome.over_hand = label, adam, hand
        assert slow in too_slow(outcome) and bool(slow) == bool(too_slow(outcome))
    assert "recurrent/x" in line(Outcome("recurrent/x", WRONG)) and "1 SILENTLY WRONG" in summary([Outcome("a/b", WRONG)])[0]


def test_selection():
    assert {case.kind for case in chosen_cases(["pinn", "graphs/index-add"])} == {"pinn", "graphs"}
    assert not chosen_cases(["nothing"])
