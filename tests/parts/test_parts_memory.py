"""What an optimizer has learned of one closure, or of one set of batches, does not reach the next."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import mlp, rand, relative
from parts.step_problems import ROWS, data, parameters_of
from torch import nn

import pgdfast

OUTSIDE = rand(4, 2, seed=9)


def cut(sizes):
    return list(zip(*(t[: sum(sizes)].split(sizes) for t in data()), strict=True))


def ends(model, make, plan, whole):
    """Parameters after steps of a plan, [(which of `make`'s closures, sizes of batches)]."""
    closures, opt = make(model), pgdfast.LM(model.parameters(), damping_rule="gain-ratio")
    for which, sizes in plan:
        if whole:
            x, y = (t[: sum(sizes)] for t in data())
            opt.step(lambda f=closures[which], x=x, y=y: f((x, y)))
        else:
            opt.step(closures[which], cut(sizes))
    return parameters_of(opt)


def squares(model):
    return lambda b: (model(b[0]) - b[1]).square().sum()


def divided(model):
    def over(count):
        return lambda b: squares(model)(b) / count(b)

    return over(lambda b: ROWS), over(lambda b: len(b[0]))


def penalised(model):
    return (lambda b: F.mse_loss(model(b[0]), b[1]) + 1e-3 * sum(p.abs().sum() for p in model.parameters()),)


@pytest.mark.parametrize(("make", "plan"), [
    (divided, [(0, [13, 13]), (1, [13, 13]), (0, [13, 13])]), (divided, [(1, [13, 13]), (0, [13, 13])]),
    (penalised, [(0, [ROWS]), (0, [9, 5, 12]), (0, [13, 13]), (0, [13]), (0, [1] * 7)]),
], ids=["sums and means", "means and sums", "one batch and more"])
def test_closures_and_batches_may_change_from_step_to_step(make, plan):
    assert relative(ends(mlp(2, 7, 1), make, plan, False), ends(mlp(2, 7, 1), make, plan, True)) < 1e-10


def test_a_term_that_counts_once_is_seen_with_the_second_batch_too():
    model = mlp(2, 7, 1)
    opt = pgdfast.LM(model.parameters(), check="never")

    def closure(b):
        return F.mse_loss(model(b[0]), b[1]) + model(OUTSIDE).square().sum()

    opt.step(closure, cut([ROWS]))
    with pytest.raises(ValueError, match="a sum of the same value"):
        opt.step(closure, cut([9, 5, 12]))


def test_batch_norm_that_begins_to_train_and_functions_of_functions_are_looked_at_again():
    model = nn.Sequential(mlp(2, 7), nn.BatchNorm1d(7, dtype=torch.float64), mlp(7, 1)).eval()
    opt = pgdfast.LM(model.parameters())

    def made(prepare):
        return lambda b: F.mse_loss(model(prepare(b[0])), b[1])

    opt.step(made(lambda x: x), cut([9, 5, 12]))
    with pytest.raises(ValueError, match="rows depend on each other"):
        opt.step(made(lambda x: x - x.mean(0)), cut([9, 5, 12]))
    model.train()
    with pytest.raises(ValueError, match="rows depend on each other"):
        opt.step(made(lambda x: x), cut([9, 5, 12]))


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_numbers_of_numpy_and_python_are_drawn_again(draw):
    model = mlp(2, 7, 1)
    opt = pgdfast.LM(model.parameters(), memory=0, solver="cg")
    opt.step(lambda b: F.mse_loss(model(b[0] + draw()), b[1]), cut([9, 5, 12]))
    assert opt.report.status == "accepted" and opt.report.reruns


def test_a_generator_of_ones_own_is_named():
    model, own = mlp(2, 7, 1), torch.Generator()
    with pytest.raises(ValueError, match="when it runs again at the same parameters"):
        pgdfast.LM(model.parameters()).step(
            lambda b: F.mse_loss(model(b[0] + torch.rand(1, generator=own)), b[1]), cut([9, 5, 12])
        )
