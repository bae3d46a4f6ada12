"""Steps over the ranks of a process group: equal to one process with all rows, undone by all where one fails."""

import re

import pytest
import torch
from helpers import relative
from parts import step_problems
from parts.ranks import Pool
from parts.step_problems import LOSSES, run

BOUND = 1e-10   # of parameters after 20 steps, in float64
SOFT = {"damping": 0.1, "damping_rule": "delayed"}   # few iterations of CG, each of which waits for all ranks
DIRECT = [(loss, {"solver": solver}) for loss in LOSSES for solver in ("dual", "primal")]
EIGH, CG = ([(loss, {"solver": solver, **SOFT}) for loss in LOSSES] for solver in ("eigh", "cg"))
DEFAULT = [(loss, {}) for loss in LOSSES]
RULES = [("mean", {"damping_rule": rule}) for rule in ("constant", "gain-ratio", "delayed", "sweep")]
OTHERS = [
    ("mean", {"scaling": "marquardt"}), ("mean", {"damping_rule": "delayed", "acceleration": "geodesic"}),
    ("mean", {"damping_rule": "delayed", "acceleration": "chord"}), ("mean", {"momentum": 0.5}),
    ("terms", {"damping_rule": "constant", "line_search": "armijo", "damping": 0.1}),
    ("mean", {"norm_constraint": 0.1, "damping": 0.1, "damping_rule": "constant"}), ("penalty", {"weight_decay": 1e-3}),
    ("mean", {"backend": "torch"}), ("mean", {"backend": "torch", "solver": "primal"}),
]
BATCHES = [(loss, {}, 20, 4) for loss in LOSSES] + [("mean", {"solver": "dual"}, 20, 3)]
ALL = {"direct": DIRECT, "eigh": EIGH, "cg": CG[::4], "default": DEFAULT, "rules": RULES, "others": OTHERS, "batches": BATCHES}
MIXED = {3: [DIRECT[2], DIRECT[9], DEFAULT[2], BATCHES[3]], 4: [DIRECT[6], EIGH[0], DEFAULT[4], BATCHES[2]]}
TABLES = [(2, name) for name in ALL] + [(3, "mixed"), (4, "mixed")]
TABLES += [pytest.param(size, name, marks=pytest.mark.slow) for size in (3, 4) for name in ALL]
TABLES.append(pytest.param(2, "all of cg", marks=pytest.mark.slow))


@pytest.mark.parametrize(("size", "table"), TABLES)
def test_ranks_step_as_one_process_with_all_rows(pool, size, table):
    cases = MIXED[size] if table == "mixed" else CG if table == "all of cg" else ALL[table]
    every = pool.run(size, step_problems.runs, cases)
    for number, case in enumerate(cases):
        alone, (loss, options, *_) = run(None, *case), case
        ends = [found[number] for found in every]
        assert all(torch.equal(end[0], ends[0][0]) and end[1:] == ends[0][1:] for end in ends), f"{loss} {options}: bits"
        apart = relative(ends[0][0], alone[0])
        assert apart < BOUND, f"{loss} {options}: {apart:.1e}"
        assert [each[::2] for each in ends[0][2]] == [each[::2] for each in alone[2]], f"{loss} {options}"


@pytest.mark.parametrize(("size", "solver", "widths"), [
    (2, "primal", (20, 20)), (3, "primal", (20, 20)), (3, "cg", (20, 20)), (3, "dual", (60, 60)),
])
def test_the_report_counts_what_a_rank_sends(pool, size, solver, widths):
    (M, P, iterations, words), *others = pool.run(size, step_problems.sent, solver, widths)
    share = (size - 1) / size
    few = 2 * M * size + 40   # residuals, which ranks with fewer rows fill up, and single numbers
    assert all(each[3] == words for each in others)
    if solver == "primal":   # blocks of at most P / 8 rows of a triangle
        assert share * P * P < words < share * (P * P * 9 / 8 + 2 * 2 * P) + few
    elif solver == "cg":
        assert iterations > 1 and 2 * share * iterations * P < words < 2 * share * (iterations + 2) * (P + 1) + few
    else:
        assert 2 * share * P < words < 0.5 * share * M * P, "factors, not rows"


@pytest.mark.parametrize(("kind", "name", "text"), [
    ("first nan", "ValueError", "rank 1: pgdfast.LM: the loss before the step is nan"),
    ("first closure", "ZeroDivisionError", "rank 1: in the data"),
    ("first memory", "MemoryError", "rank 1: of 8 GB"),
    ("first result", "ValueError", "rank 1: pgdfast.LM: closure returned str"),
    ("first terms", "ValueError", "the closure must compute the same loss for every part"),
    ("first ctrl-c", "KeyboardInterrupt", ""),
    ("trial closure", "ZeroDivisionError", "rank 1: in the data"),
    ("trial memory", "MemoryError", "rank 1: of 8 GB"),
    ("trial ctrl-c", "KeyboardInterrupt", ""),
    ("trial nan", None, ""),
])
@pytest.mark.parametrize("options", ({}, {"damping_rule": "delayed", "acceleration": "chord", "solver": "primal"}),
                         ids=("default", "chord"))
def test_an_error_of_one_rank_undoes_the_step_of_all(pool, kind, name, text, options):
    found = pool.run(3, step_problems.trouble, kind, options)
    for raised, unchanged, status, end in found:
        if name is None:
            assert raised is None and status == "accepted"
        else:
            assert raised[0] == name and text in raised[1] and unchanged, raised
        assert torch.equal(end, found[0][3]) and end.isfinite().all()


def test_the_rows_of_one_rank_or_of_all_may_be_none(pool):
    assert pool.run(2, step_problems.nothing) == [("empty", True)] * 2
    one, other = pool.run(2, step_problems.no_batches, [1]), pool.run(2, step_problems.no_batches, [0])
    assert torch.equal(one[0], one[1]) and torch.equal(other[0], other[1])
    assert relative(one[0], other[0]) < 1e-12


@pytest.mark.parametrize("options", ({}, {"damping_rule": "delayed", "scaling": "marquardt"}), ids=("default", "marquardt"))
def test_checkpoints_of_one_number_of_ranks_load_in_another(pool, tmp_path, options):
    path = str(tmp_path / "state")
    whole = step_problems.saved(None, path + "-alone", "mean", options, 12)
    pool.run(3, step_problems.saved, path, "mean", options, 6)
    for size in (2, 3, 4):
        for end in pool.run(size, step_problems.saved, path, "mean", options, 12, 6):
            assert relative(end, whole) < BOUND
    assert relative(step_problems.saved(None, path, "mean", options, 12, 6), whole) < BOUND
    step_problems.saved(None, path, "mean", options, 6)
    assert relative(pool.run(2, step_problems.saved, path, "mean", options, 12, 6)[1], whole) < BOUND


@pytest.mark.parametrize("options", (
    {}, {"find_unused_parameters": True}, {"static_graph": True}, {"broadcast_buffers": False},
    {"gradient_as_bucket_view": True},
), ids=lambda options: next(iter(options), "default"))
def test_a_module_in_distributed_data_parallel_is_the_bare_module(pool, options):
    for bare, end, refused, hooked in pool.run(2, step_problems.wrapped, options, 4, "broadcast_buffers" not in options):
        assert torch.equal(bare, end)
        assert "process_group=" in refused and "beside those of DistributedDataParallel" in hooked


def test_options_that_differ_are_refused(pool):
    for said in pool.run(2, step_problems.other_options):
        assert "all ranks must have equal options; rank 0 has {'damping': 0.25}, rank 1: {'damping': 0.5}" in said


@pytest.mark.parametrize(("kind", "words"), [
    ("sharded", "is a DTensor with the placements (S(0))"), ("replicated", "torch.nn.Parameter(p.to_local())"),
    ("fsdp2", "without fully_shard"), ("hybrid", "(R, S(0))"), ("fsdp1 original", "belongs to FullyShardedDataParallel"),
    ("fsdp1", "belongs to FullyShardedDataParallel"),
])
@pytest.mark.filterwarnings("ignore")
def test_parameters_that_are_not_whole_are_refused(pool, kind, words):
    for said in pool.run(4, step_problems.distributed, kind):
        for text, where in zip(said, ("LM", "LM", "linearize"), strict=True):
            assert text and text.startswith(f"pgdfast.{where}: parameter 0") and words in text, text


def _killed(path, delay, options):
    pool = Pool(2, timeout=10)
    try:
        (kind, text, seconds, step, undone), dead = pool.run(2, step_problems.killed, path, options, delay, expect_death={1})
    finally:
        pool.stop()
    assert dead is None and kind == "LostRank" and "last checkpoint" in text and seconds < 10 and undone
    return step


@pytest.mark.parametrize("number", [0, *[pytest.param(k, marks=pytest.mark.slow) for k in range(1, 10)]])
def test_a_killed_rank_ends_the_others_and_the_last_checkpoint_goes_on(tmp_path, number):
    options = {"solver": ("dual", "primal", "cg")[number % 3], "damping": 1.0, "damping_rule": "constant"}
    delay = 0.3 * float(torch.rand((), generator=torch.Generator().manual_seed(number)))
    path = str(tmp_path / "state")
    step = _killed(path, delay, options)
    resumed = step_problems.saved(None, path, "mean", options, step + 5, step)
    assert relative(resumed, run(None, "mean", options, step + 5)[0]) < BOUND


@pytest.mark.parametrize(("kind", "text"), [
    ("kinds", "cannot be told|is a mean over rows in"), ("penalties", "a penalty counts once"),
])
def test_what_all_ranks_refuse_alike_leaves_the_group_at_work(pool, kind, text):
    told = pool.run(2, step_problems.refused, kind)
    assert all(one == told[0] for one in told) and re.search(text, told[0][0]) and told[0][1] > 0
