"""Random closures against the oracle: what the linearization gives, and the step; and that a fault is noticed."""

import bench_folder  # noqa: F401 - makes `bench` importable
import pytest
import torch

from bench.closures import random_operations, random_runner
from bench.closures.random_closures import RandomClosure
from bench.closures.random_runner import AGREES, DIFFERS, SKIPPED, compare, run
from pgdfast.linear import Linearization

SEEDS = (*range(60), 2884, 4545, 7319, 12449, 13524)   # in the last ones J, or the gradient, is nearly or wholly cancelled


@pytest.mark.parametrize("seed", SEEDS)
def test_random_closure(seed):
    ((_, verdict, why, closure),) = run([seed])
    assert verdict in (AGREES, SKIPPED), f"{why}; {closure.described()}"


def test_few_are_skipped_and_many_operations_drawn():
    closures = [RandomClosure(seed) for seed in range(300)]
    assert len({node.name for closure in closures for node in closure.nodes}) > 200
    assert len(random_operations.OPERATIONS) > 200
    assert sum(compare(closure, 1)[0] == SKIPPED for closure in closures[:30]) < 3


def test_seeds_repeat():
    first, second = RandomClosure(7), RandomClosure(7)
    assert first.described() == second.described()
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("verb", ["jvp", "vjp", "dense", "gram", "gradient"])
def test_a_fault_is_noticed(monkeypatch, verb):
    right = getattr(Linearization, verb)
    monkeypatch.setattr(Linearization, verb, lambda self, *vectors: right(self, *vectors) * (1 + 1e-7))
    seed = next(s for s in SEEDS if RandomClosure(s).squares)
    assert compare(RandomClosure(seed))[0] == DIFFERS


def test_shrinking_ends_at_the_operation_at_fault(monkeypatch):
    """Where the gradient of every closure with a sine in it is held to be another, the shortest prefix ends in one."""
    seed = next(s for s in range(400) if "sin" in [node.name for node in RandomClosure(s).nodes[:-1]])
    right = random_runner.truth

    def other_truth(closure):
        found = right(closure)
        if any(node.name == "sin" for node in closure.nodes):
            found.gradient = found.gradient * 1.1
        return found

    monkeypatch.setattr(random_runner, "truth", other_truth)
    assert compare(RandomClosure(seed))[0] == DIFFERS
    assert random_runner.smallest(seed).split(": ")[0].endswith("sin")
