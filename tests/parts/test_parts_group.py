"""What is asked of torch.distributed: sums and gathers with their words, errors that all ranks raise, and ranks that go."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers import mlp, rand
from parts import on_ranks
from parts.on_ranks import rows_of
from parts.ranks import Pool, RankError

import pgdfast
from pgdfast.parts.group import Alone, Ranks

SIZES = (1, 2, 3, 4)


@pytest.mark.parametrize("size", SIZES)
def test_collectives_have_every_ranks_values_and_count_words(pool, size):
    every = pool.run(size, on_ranks.collectives)
    rows = torch.cat([rows_of(r) for r in range(size)])
    wide = torch.cat([rows_of(r, 7) for r in range(size)])
    longest = max(len(rows_of(r)) for r in range(size))
    share = (size - 1) / size
    expected = {   # value, numbers of the model
        "total": (sum(rand(7, seed=r) for r in range(size)), 2 * 7),
        "view": (sum(rand(4, 6, seed=r).T[1:3] for r in range(size)), 2 * 8),
        "adding": (sum(rows_of(r)[:2].sum(0).float() + 1 for r in range(size)).expand(2, 3), 2 * 7),
        "joined": (rows, 3 * size * longest + size),
        "known": (rows, 3 * size * longest),
        "equal": (torch.cat([rand(2, 3, seed=r) for r in range(size)]), 6 * size + size),
        "nobody": (rows[:0], size),
        "no columns": (rows[:, :0], size),
        "infinite": (float("inf"), 4),
        "least": (min([5.0, float("inf"), -2.5, 3.0][:size]), 4),
        "objects": ([{"rank": r} for r in range(size)], 0),
    }
    for rank, (number, count, found) in enumerate(every):
        assert (number, count) == (rank, size)
        for name, (value, numbers) in expected.items():
            got, words = found[name]
            if isinstance(value, torch.Tensor):
                assert got.shape == value.shape and got.dtype == value.dtype, name
                torch.testing.assert_close(got, value, rtol=1e-6 if value.dtype == torch.float32 else 1e-13, atol=1e-13)
            else:
                assert got == value, name
            assert words == pytest.approx(share * numbers), name
        assert [part.tolist() for part in found["gather"][0]] == [rows_of(r)[:, 0].float().tolist() for r in range(size)]
        for name, whole in (("columns", wide), ("few columns", rows[:, :1])):
            a, b = (whole.shape[1] * k // size for k in (rank, rank + 1))
            assert torch.equal(found[name][0], whole[:, a:b]), name
        assert found["columns"][1] == pytest.approx(share * (7 * len(rows_of(rank)) + size))
        assert torch.equal(found["same"][0], rand(5)) and found["same"][1] == pytest.approx(share * 5)
        if size > 1:
            assert found["nan"][0][0] == "ValueError" and "NaN" in found["nan"][0][1]


@pytest.mark.parametrize("size", (2, 3, 4))
def test_all_ranks_have_the_same_bits_of_a_sum_each_time(pool, size):
    found = pool.run(size, on_ranks.sums)
    assert len({digest for digest, _ in found}) == 1 and all(repeats for _, repeats in found)


@pytest.mark.parametrize(("case", "kind", "text"), [
    ("value", "ValueError", "pgdfast.LM: no rows"),
    ("type", "TypeError", "not that"),
    ("memory", "MemoryError", "1 GB"),
    ("cuda", "OutOfMemoryError", "of memory"),
    ("silent", "ZeroDivisionError", "ZeroDivisionError"),
    ("key", "KeyError", "name"),
    ("own", "RuntimeError", "Picky: 1 and 2"),
    ("stop", "RuntimeError", "StopIteration: end"),
    ("pickle", "PickleError", "local"),
    ("unicode", "RuntimeError", "UnicodeDecodeError: 'utf-8'"),
])
def test_an_error_of_one_rank_is_raised_by_all(pool, case, kind, text):
    found = pool.run(3, on_ranks.failing, case, {2: case})
    for rank, ((name, said, cause), total) in enumerate(found):
        assert name == kind and "rank 2: " in said and text in said, said
        assert cause == (type(on_ranks.ERRORS[case]()).__name__ if rank == 2 else "NoneType") and total == 3
    assert len({said for (_, said, _), _ in found}) == 1


@pytest.mark.parametrize(("case", "kind"), [("ctrl-c", "KeyboardInterrupt"), ("exit", "SystemExit")])
def test_an_interruption_of_one_rank_interrupts_all(pool, case, kind):
    found = pool.run(3, on_ranks.failing, case, {0: "value", 1: case})
    assert [name for (name, _, _), _ in found] == [kind] * 3
    assert "rank 1" in found[2][0][1] and "rank 0: ValueError: pgdfast.LM: no rows" in found[2][0][1]
    assert found[1][0][1] == ("" if case == "ctrl-c" else "3"), "its own, as it came"


@pytest.mark.parametrize(("who", "said"), [
    ({0: "value", 2: "value"}, "ranks 0, 2: pgdfast.LM: no rows"),
    ({1: "value", 2: "type"}, "rank 1: pgdfast.LM: no rows; rank 2: TypeError: not that"),
    ({}, None),
])
def test_errors_of_several_ranks_are_one(pool, who, said):
    for raised, total in pool.run(3, on_ranks.failing, "", who):
        assert total == 3 and (raised is None if said is None else raised[1] == said)


def test_an_error_before_a_sum_is_raised_by_all(pool):
    for raised, total in pool.run(3, on_ranks.failing_sum):
        assert raised[:2] == ("MemoryError", "rank 1: no room") and total == 3


def test_an_error_is_settled_once(pool):
    for (name, said, _), total in pool.run(2, on_ranks.nested):
        assert (name, said, total) == ("ValueError", "rank 1: inside", 2)


@pytest.mark.parametrize(("what", "words"), [
    ("shape", "rank 1"), ("dtype", "float32"), ("option", "dampings; rank 0 has 0.25, rank 1: 0.5"),
    ("list", "rank 0 has [((3, 2), 'float64'), "), ("bit", "rank 1 differ"),
    ("sign of zero", "rank 1 differ"), ("swapped", "rank 1 differ"), ("nothing", None),
])
def test_ranks_that_differ_are_told_at_once(pool, what, words):
    for raised in pool.run(3, on_ranks.different, what):
        assert raised is None if words is None else raised[0] == "ValueError" and words in raised[1], raised


def test_parameters_of_all_kinds_are_compared(pool):
    for found in pool.run(2, on_ranks.kinds):
        assert len(found) == 7 and all(raised[0] == "ValueError" and "rank 1 differ" in raised[1] for raised in found)


@pytest.mark.parametrize(("check_every", "seen"), [(0, None), (1, 1), (3, 3)])
def test_values_are_compared_every_so_many_steps(pool, check_every, seen):
    assert pool.run(2, on_ranks.now_and_then, check_every) == [seen, seen]


def test_a_rank_that_does_not_answer_is_an_error_within_the_time_out():
    pool = Pool(3, timeout=2)
    try:
        left = pool.run(2, on_ranks.abandoned)
        (first, waited, again), _, _ = pool.run(3, on_ranks.late, 4.0)   # a group of its own
    finally:
        pool.stop()
    assert first[0] == "LostRank" and "time-out" in first[1] and "checkpoint" in first[1] and 1 < waited < 4
    assert [name for name, _, _ in left] == ["LostRank"] * 2, "no numbers of one step are taken for those of another"
    assert again == first[1], "nothing more is asked of a broken group"


def test_a_rank_that_is_killed_is_an_error_at_once_and_the_harness_starts_again():
    pool = Pool(2)
    try:
        with pytest.raises(RankError, match="rank 1 of 2(.|\n)*division by zero"):
            pool.run(2, on_ranks.divided)
        (raised, waited), dead = pool.run(2, on_ranks.killed, expect_death={1})
    finally:
        pool.stop()
    assert raised[0] == "LostRank" and waited < 5 and dead is None


def test_one_process_has_the_same_names_and_does_nothing():
    alone, t = Alone(), rand(4, 3)
    public = {name for name in vars(Ranks) if not name.startswith("_")} | {"rank", "size", "words"}
    assert {name for name in dir(alone) if not name.startswith("_")} == public
    for found in (alone.total(t), alone.same(t), alone.joined(t), alone.gather(t)[0], alone.columns_of(t)):
        assert found is t
    assert (alone.objects(1), alone.least(2.0), alone.sizes(4), alone.words, alone.size) == ([1], 2.0, [4], 0, 1)
    with pytest.raises(ValueError, match="^own$"), alone.section():
        raise ValueError("own")
    with alone.section():
        pass


def test_without_a_group_it_says_how_to_start_one():
    with pytest.raises(ValueError, match="torchrun.*init_process_group"):
        Ranks(dist.group.WORLD)


@pytest.fixture
def world(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_groups_that_cannot_serve_are_refused(world):
    with pytest.raises(ValueError, match="process_group is a str"):
        Ranks("gloo")
    with pytest.raises(ValueError, match="does not belong"):
        Ranks(dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="check_every is -1"):
        Ranks(dist.group.WORLD, -1)
    ranks = Ranks(dist.group.WORLD)
    with pytest.raises(ValueError, match="rank 0 are on meta and the process group has the backend gloo"):
        ranks.check([torch.zeros(2, device="meta")])
    assert copy.deepcopy(ranks) is ranks
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(ranks)
    with pytest.raises(ValueError, match="^own$"), ranks.section():
        raise ValueError("own")


def test_what_does_not_go_with_a_group_is_refused(world):
    model = mlp(2, 3, 1)
    lm = pgdfast.LM(model.parameters(), process_group=world)
    adam = torch.optim.Adam(model.parameters())
    for act, words in (
        (lambda: pgdfast.CapturedStep(lm, lambda: model(rand(4, 2))), "CapturedStep: process_group does not work"),
        (lambda: pgdfast.Hybrid(lm, adam), "Hybrid: lm steps in a process group"),
        (lambda: copy.deepcopy(lm), "cannot be copied"),
        (lambda: pgdfast.LM(model.parameters(), process_group=world, backend="reference"), "runs in one process"),
        (lambda: pgdfast.LM([rand(2, 3).requires_grad_()], process_group=world, ensemble=2), "ensemble"),
    ):
        with pytest.raises(ValueError, match=words):
            act()
