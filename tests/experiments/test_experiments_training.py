"""Network initialization, optimizers by name, and the training loop."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import pgdfast
from pgdfast_experiments.methods import parse
from pgdfast_experiments.models import tanh_mlp
from pgdfast_experiments.spectral import KNOWN
from pgdfast_experiments.training import (
    Batches,
    Case,
    Session,
    adam_step_ms,
    every,
    geometric,
    least_squares_closure,
    torch_threads,
    train,
)


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_weights_are_kaiming_uniform_and_biases_zero(hidden_layers):
    linear = [m for m in tanh_mlp(2, 80, hidden_layers, 1, seed=0) if hasattr(m, "weight")]
    between = [(80, 80)] * (hidden_layers - 1)
    assert [m.weight.shape[::-1] for m in linear] == [(2, 80), *between, (80, 1)]
    for layer in linear:
        bound = math.sqrt(6 / layer.in_features)
        assert layer.weight.dtype is torch.float64
        assert layer.weight.abs().max() <= bound
        # The largest of n uniform draws is below 0.9 of the bound with chance 0.9^n <= 2e-4.
        assert layer.weight.abs().max() > 0.9 * bound
        assert not layer.bias.any()


def test_the_same_seed_gives_the_same_network_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, other = (torch.nn.utils.parameters_to_vector(tanh_mlp(1, 8, 2, 1, seed).parameters())
                       for seed in (4, 4, 5))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "kind", "damping"), [
    ("sgd", torch.optim.SGD, None),
    ("adam", torch.optim.Adam, None),
    ("gn", pgdfast.LM, 0.0),
    ("lm-0.5", pgdfast.LM, 0.5),
    ("lm-1e-3", pgdfast.LM, 1e-3),
    ("lm-2", pgdfast.LM, 2.0),
])
def test_a_name_gives_its_optimizer(name, kind, damping):
    method = parse(name, KNOWN)
    assert method.damping == damping
    optimizer = method.build([torch.zeros(2, requires_grad=True)], lr=0.25)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    "name", ["", "lm", "adamw", "lm-", "lm-0", "lm--1", "lm-nan", "lm-inf", "lm-x", "lbfgs"]
)
def test_no_other_name_is_known(name):
    assert parse(name, KNOWN) is None


def test_one_number_has_one_name():
    assert parse("lm-0.10", KNOWN) == parse("lm-1e-1", KNOWN) == parse("lm-0.1", KNOWN)


def test_first_order_closures_have_the_gradient_of_the_mean_and_lm_the_residual():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=1.0)

    def residual():
        return weight * 3

    assert least_squares_closure(None, residual, second_order=True) is residual
    loss = least_squares_closure(sgd, residual, second_order=False)()
    assert loss.item() == pytest.approx((9 + 36) / 2 / 2)
    assert weight.grad.tolist() == pytest.approx([9 / 2, 18 / 2])


def _session(weight, optimizer, measure, rows, done=lambda row: False):
    model = torch.nn.Module()
    model.weight = weight
    closure = least_squares_closure(optimizer, lambda: weight, second_order=False)
    return Session(model, optimizer, lambda step: closure, measure, ("w",), np.asarray(rows), done)


def _case(steps):
    return Case("sgd", "alpha=1", 7, steps, None)


def _halving(rows, done=lambda row: False):
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    return _session(weight, torch.optim.SGD([weight], lr=0.5), lambda: (weight.item(),), rows, done)


def test_the_loop_measures_before_the_first_step_and_at_its_rows():
    seen = []
    run = train(_case(4), _halving([0, 1, 4]), advance=seen.append)
    assert (run.key, run.last, run.stopped_at) == (("sgd", "alpha=1", 7), 4, None)
    assert run.at.tolist() == [0, 1, 4] and run.columns["w"].tolist() == [1.0, 0.5, 0.0625]
    assert (run.step_seconds > 0).all() and run.step_seconds.shape == (4,) and sum(seen) == 4
    assert run.seconds[0] == 0 and run.seconds[2] == pytest.approx(run.step_seconds.sum())


def test_a_run_that_is_no_longer_finite_ends_there():
    values = iter([1.0, 2.0, math.inf, 3.0])
    weight = torch.nn.Parameter(torch.zeros(1))
    session = _session(weight, torch.optim.SGD([weight], lr=0.1), lambda: (next(values),), range(10))
    run = train(_case(9), session)
    assert run.stopped_at == run.last == 2
    assert run.columns["w"][:3].tolist() == [1.0, 2.0, math.inf]
    assert np.isnan(run.columns["w"][3:]).all() and np.isnan(run.step_seconds[2:]).all()


def test_a_run_that_is_done_ends_there():
    run = train(_case(9), _halving(range(10), lambda row: row["w"] < 0.3))
    assert run.last == 2 and run.stopped_at is None and np.isnan(run.columns["w"][3:]).all()


def test_a_loss_that_lm_refuses_between_two_rows_ends_the_run():
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = pgdfast.LM([weight], lr=1.0, damping=1.0, damping_rule="constant")
    session = _session(weight, optimizer, lambda: (1.0,), [0, 5])
    session.closure = lambda step: lambda: weight * (float("nan") if step == 3 else 1.0)
    run = train(_case(5), session)
    assert run.stopped_at == run.last == 2


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_goes_on_from_its_saved_state_on_the_same_trajectory(stop):
    def session():
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = torch.optim.Adam([weight], lr=0.1)
        return _session(weight, optimizer, lambda: (float(weight.detach().sum()),), [0, 1, 3, 6])

    states = []
    whole = train(_case(6), session(), keep=lambda state: states.append(copy.deepcopy(state())))
    again = train(_case(6), session(), saved=states[stop - 1])
    assert again.columns["w"].tolist() == whole.columns["w"].tolist()
    assert again.last == 6 and np.isfinite(again.step_seconds).all()


@pytest.fixture
def ticking(monkeypatch):
    """A clock by which every step takes a millisecond."""
    ticks = itertools.count()
    monkeypatch.setattr("pgdfast_experiments.training.time.perf_counter", lambda: next(ticks) * 1e-3)


def _by_seconds(seconds, steps=10**6, done=lambda row: False):
    case = Case("sgd", "", 0, steps, None, seconds)
    return case, dataclasses.replace(_halving([0], done), rows=None)


def test_a_run_by_seconds_ends_with_the_first_step_past_them_and_measures_as_its_time_grows(ticking):
    case, session = _by_seconds(0.3005)
    shares, seen = [], []
    session.schedule = shares.append
    session.outcome = lambda: {"w": session.model.weight.detach().clone()}
    run = train(case, session, advance=seen.append)
    assert case.work == 0.3005 and run.last == len(run.step_seconds) == 301
    assert shares == pytest.approx([step * 1e-3 / 0.3005 for step in range(301)]) and sum(seen) == pytest.approx(0.301)
    assert run.at[:4].tolist() == [0, 2, 4, 6] and run.at[-1] == 301
    assert 0.29 < run.seconds[-2] < 0.3 and np.diff(run.seconds)[-5:-1] == pytest.approx(6e-3), "2 % of 0.3"
    assert run.columns["w"][-1] == run.outcome["w"].item()


def test_a_run_by_seconds_ends_at_its_limit_of_steps_or_when_it_is_done(ticking):
    case, session = _by_seconds(60.0, steps=3)
    run = train(case, session)
    assert run.last == 3 and run.at[-1] == 3 and len(run.step_seconds) == 3
    case, session = _by_seconds(60.0, done=lambda row: row["w"] < 1e-3)
    assert train(case, session).columns["w"][-1] < 1e-3


def test_a_run_by_seconds_goes_on_with_the_time_that_is_left(ticking):
    case, session = _by_seconds(0.1005)
    states = []
    whole = train(case, session, keep=lambda state: states.append(copy.deepcopy(state())))
    case, session = _by_seconds(0.1005)
    again = train(case, session, saved=states[40])
    assert len(states[40]["seconds"]) == 41 and again.last == whole.last
    assert set(whole.at[whole.at <= 41]) <= set(again.at) and again.columns["w"][-1] == whole.columns["w"][-1]


def test_minibatches_depend_on_seed_and_step_alone():
    one, two = Batches(10, 3, seed=4), Batches(10, 3, seed=4)
    first = [one(step) for step in range(1, 8)]
    assert torch.equal(two(5), first[4]) and torch.equal(two(2), first[1])
    assert sorted(torch.cat(first[:3]).tolist()) == sorted(set(torch.cat(first[:3]).tolist()))
    assert not torch.equal(Batches(10, 3, seed=5)(1), first[0])
    assert Batches(2, 3, seed=0)(9).shape == (2,)


@pytest.mark.parametrize("rows", [every(100, 7), every(100, 10, dense=5), geometric(100), geometric(3), every(1, 5)])
def test_rows_rise_from_zero_to_the_last_step(rows):
    assert rows[0] == 0 and (np.diff(rows) > 0).all() and rows[-1] in (100, 3, 1)


def test_timing_adam_leaves_the_model_alone():
    model = tanh_mlp(1, 4, 1, 1, seed=0)
    before = [parameter.clone() for parameter in model.parameters()]
    assert adam_step_ms(model, lambda m: m(torch.ones(3, 1, dtype=torch.float64)), 0.1, steps=3) > 0
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_thread_count_is_put_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
