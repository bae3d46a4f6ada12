"""A batch in two: losses that rows depend on each other in are found out, and numbers that count rows."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import mlp, rand
from torch import nn

from pgdfast.parts.combine import Combination
from pgdfast.parts.probe import probe
from pgdfast.tape import Tracer

X, Y = rand(10, 3, seed=1), rand(10, 2, seed=2)
MODEL = mlp(3, 5, 2)
NORMED = nn.Sequential(mlp(3, 4), nn.BatchNorm1d(4, dtype=torch.float64), mlp(4, 2))


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "data"


def squares(b):
    return (MODEL(b[0]) - b[1]).square()


def number(b):
    return len(b[0])


AGREEING = {  # loss, and what is settled that the tape does not tell
    "mse": (lambda b: F.mse_loss(MODEL(b[0]), b[1]), ("mean",)),
    "sum": (lambda b: squares(b).sum(), ("sum",)),
    "residuals": (lambda b: MODEL(b[0]) - b[1], ("sum",)),
    "one residual more": (lambda b: (MODEL(b[0]) - b[1], MODEL[0].bias), ("sum", "once")),
    "over n": (lambda b: squares(b).sum() / number(b), ("mean",)),
    "over ten": (lambda b: squares(b).sum() / 10, ("sum",)),
    "over twenty": (lambda b: squares(b).sum() / 20, ("sum",)),
    "half over n": (lambda b: squares(b).sum() / (2 * number(b)), ("mean",)),
    "times a tenth": (lambda b: squares(b).sum() * 0.1, ("sum",)),
    "ten means": (lambda b: 10 * squares(b).mean(), ("mean",)),
    "n means": (lambda b: number(b) * squares(b).mean(), ("sum",)),
    "over roots": (lambda b: (MODEL(b[0]) - b[1]) / number(b) ** 0.5, ("mean",)),
    "l1": (lambda b: (MODEL(b[0]) - b[1]).abs().mean(), ("mean",)),
    "two terms": (
        lambda b: squares(b).sum() / 10 + F.huber_loss(MODEL(b[0]), b[1], reduction="sum") / number(b),
        ("sum", "mean"),
    ),
    "penalty": (lambda b: squares(b).sum() + MODEL[0].weight.square().sum(), ("sum",)),
    "constant": (lambda b: squares(b).sum() + 3.0, ("sum",)),
    "outputs first": (lambda b: (MODEL(b[0]) - b[1]).T.square().mean(1).sum(), ("mean",)),
    "outputs by themselves": (lambda b: squares(b).T.contiguous()[0].mean(), ("mean",)),
}


@pytest.mark.parametrize("name", AGREEING)
def test_losses_agree_and_numbers_are_settled(name):
    loss, expected = AGREEING[name]
    tracer = Tracer(list(MODEL.parameters()))
    found = probe(loss, (X, Y), tracer)
    assert found.disagreement == "" and found.settled == expected
    parts = [tracer.shares(loss((X + k, Y))) for k in range(3)]  # of one size
    assert Combination(parts, settled=found.settled).kinds == expected


def contrast(b):
    z = MODEL(b[0])
    return F.mse_loss(z, z.detach().roll(1, 0) + b[1])


DISAGREEING = {
    "batch norm": lambda b: F.mse_loss(NORMED(b[0]), b[1]),
    "centred over rows": lambda b: (lambda r: (r - r.mean(0)).square().mean())(MODEL(b[0]) - b[1]),
    "neighbours": lambda b: (MODEL(b[0]).diff(dim=0) - b[1][1:]).square().sum(),
    "contrast": contrast,
    "normalised weights": lambda b: (squares(b).sum(1) * b[0][:, 0].softmax(0)).sum(),
    "mean of outputs": lambda b: (MODEL(b[0]).mean(0) - 1).square().sum(),
    "factor of n": lambda b: (0.3 + number(b)) * squares(b).mean(),
    "decay over n": lambda b: squares(b).mean() + MODEL[0].weight.square().sum() / number(b),
}


@pytest.mark.parametrize("name", DISAGREEING)
def test_rows_that_depend_on_each_other_are_found_out(name):
    params = [*MODEL.parameters(), *NORMED.parameters()]
    found = probe(DISAGREEING[name], (X, Y), Tracer(params))
    assert found.disagreement.startswith("pgdfast.LM: ") and not found.settled


@pytest.mark.parametrize("batch", [Pair(X, Y), [X, Y], Data(X, Y), {"x": X, "y": Y}, (X, Y, 3.0)])
def test_batches_of_every_kind_are_cut(batch):
    def loss(b):
        x, y = (b["x"], b["y"]) if isinstance(b, dict) else (b.x, b.y) if hasattr(b, "x") else b[:2]
        assert type(b) is type(batch)
        sizes.append(len(x))
        return F.mse_loss(MODEL(x), y)

    sizes = []
    assert probe(loss, batch, Tracer(list(MODEL.parameters())))[:2] == ("", ("mean",))
    assert sizes == [4, 6, 10]


def test_random_closures_are_left_alone():
    def loss(b):
        calls.append(len(b[0]))
        return F.mse_loss(MODEL(b[0] + torch.rand(1)), b[1])

    calls, before = [], torch.get_rng_state()
    assert probe(loss, (X, Y), Tracer(list(MODEL.parameters())))[:2] == ("", ())
    assert calls == [4] and torch.equal(before, torch.get_rng_state())


def test_batches_of_several_lengths():
    edge = rand(25, 3, seed=5)

    def loss(b):
        return squares(b).sum() / 10 + MODEL(b[2]).square().sum() / len(b[2])

    assert probe(loss, (X, Y, edge), Tracer(list(MODEL.parameters())))[:2] == ("", ("sum", "mean"))
    whole = (X, Y, torch.tensor([1.0, 2, 3]))
    assert probe(DISAGREEING["contrast"], whole, Tracer(list(MODEL.parameters())))[:2] == ("", ())


@pytest.mark.parametrize("batch", [None, 3, torch.tensor(1.0), torch.ones(1, 3), torch.ones(0, 3), torch.eye(3).to_sparse()])
def test_nothing_to_cut(batch):
    assert probe(lambda b: 1 / 0, batch, Tracer(list(MODEL.parameters())))[:2] == ("", ())
