"""Network initialisation, optimizers by name, and the training loop."""

import math

import numpy as np
import pytest
import torch

import pgdfast
from pgdfast.tasks.methods import parse
from pgdfast.tasks.models import tanh_mlp
from pgdfast.tasks.training import adam_step_ms, least_squares_closure, torch_threads, train


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
    method = parse(name)
    assert method.damping == damping
    optimizer = method.build([torch.zeros(2, requires_grad=True)], lr=0.25)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert method.settings(0.25, "auto")["lr"] == 0.25


@pytest.mark.parametrize(
    "name", ["", "lm", "lm-", "lm-0", "lm--1", "lm-nan", "lm-inf", "lm-x", "lbfgs"]
)
def test_no_other_name_is_known(name):
    assert parse(name) is None


def test_one_number_has_one_name():
    assert parse("lm-0.10") == parse("lm-1e-1") == parse("lm-0.1")


def test_first_order_closures_have_the_gradient_of_the_mean_and_lm_the_residual():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=1.0)

    def residual():
        return weight * 3

    assert least_squares_closure(None, residual, second_order=True) is residual
    loss = least_squares_closure(sgd, residual, second_order=False)()
    assert loss.item() == pytest.approx((9 + 36) / 2 / 2)
    assert weight.grad.tolist() == pytest.approx([9 / 2, 18 / 2])


def test_the_loop_measures_before_the_first_step_and_after_each():
    weight = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    closure = least_squares_closure(optimizer, lambda: weight, second_order=False)
    seen = []
    run = train("sgd", 7, optimizer, closure, lambda: (weight.item(),), ("w",), 3,
                lambda: seen.append(1))
    assert (run.optimizer, run.seed, run.steps, run.stopped_at) == ("sgd", 7, 3, None)
    assert run.columns["w"].tolist() == [1.0, 0.5, 0.25, 0.125]
    assert np.isnan(run.step_seconds[0]) and (run.step_seconds[1:] > 0).all()
    assert run.step_ms > 0 and len(seen) == 3


def test_a_run_that_is_no_longer_finite_ends_there():
    values = iter([1.0, 2.0, math.inf, 3.0])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    run = train("sgd", 0, optimizer, lambda: 0.0, lambda: (next(values),), ("w",), 9)
    assert run.stopped_at == 2
    assert run.columns["w"][:3].tolist() == [1.0, 2.0, math.inf]
    assert np.isnan(run.columns["w"][3:]).all() and np.isnan(run.step_seconds[3:]).all()


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
