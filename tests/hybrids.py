"""Hybrids of LM and a first-order optimizer on one small fit, and every kind of switch."""

import functools

import torch
from helpers import fit, rand

import pgdfast

FIRST_ORDER = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


def hybrid(params, switch=3, first_order="adamw", **options):
    options = dict(damping=0.3) | options
    return pgdfast.Hybrid(pgdfast.LM(params, **options), FIRST_ORDER[first_order](params), switch)


def steps(optimizer, closure, count):
    return [float(optimizer.step(closure)) for _ in range(count)]


def outputs(params):
    x = rand(12, 2, seed=1)
    return torch.tanh(x @ params[0].T + params[1]) @ params[2].T + params[3]


SWITCHES = {
    "number": lambda params: 4,
    "drift": lambda params: pgdfast.KernelDrift(functools.partial(outputs, params), threshold=0.05, every=2),
    "alignment": lambda params: pgdfast.Alignment(functools.partial(outputs, params), every=1, patience=2, rise=1e-3),
    "plateau": lambda params: pgdfast.Plateau(2, 0.6),
    "model": lambda params: pgdfast.Plateau(2, 0.6, of="model"),
}


def switch_step(kind):
    params, closure = fit()
    optimizer = hybrid(params, SWITCHES[kind](params), scaling="marquardt")
    steps(optimizer, closure, 40)
    assert optimizer.switched_at is not None, "the case must switch to test anything"
    return optimizer.switched_at
