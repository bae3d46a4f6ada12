"""The host's decisions, without a kernel: which instructions fuse, which products go where, which tile K takes."""

import pytest
import torch
from helpers import gradient, mlp, rand

import pgdfast
from pgdfast.kernels import cuda
from pgdfast.tape.program import Instruction, Program

CLEAR, CHAIN, REDUCE, BLAS, SMALL, GATHER, SCATTER, PROJECT = range(8)
FORWARD, ADJOINT, INNER = range(3)
REGISTER, SAME = 1, 2


def launches(kernels, direction):
    """[(task, instruction or buffer, splits, overwrites, [(instruction, flags)])] of a sweep."""
    room = 20000
    words = torch.empty(room, dtype=torch.int64)
    count = kernels.library.schedule(kernels.plan, direction, words.data_ptr(), room)
    assert count <= room
    numbers, found = iter(words[:count].tolist()), []
    for task in numbers:
        what, links, splits, overwrites = (next(numbers) for _ in range(4))
        found.append((task, what, splits, bool(overwrites), [(next(numbers), next(numbers)) for _ in range(links)]))
    return found


def kernels_of(library, closure, params, dtype=torch.float64):
    lin = pgdfast.linearize(closure, params)
    return cuda.Kernels(lin._plan.program, dtype, library=library), lin._plan.program


def test_a_network_runs_as_products_and_epilogues(emulated):
    model, x = mlp(3, 17, 9, 2), rand(37, 3)
    kernels, program = kernels_of(emulated, lambda: model(x) ** 2, list(model.parameters()))
    forward = launches(kernels, FORWARD)
    assert [task for task, *_ in forward] == [SMALL, CHAIN, SMALL, SMALL, CHAIN, SMALL, SMALL, CHAIN]
    bias, scale = forward[1][4]   # a bias and the activation's slope behind it, in one kernel, the sum passed on in a register
    assert program.instructions[bias[0]].constant < 0 and program.instructions[scale[0]].constant >= 0
    assert (bias[1], scale[1]) == (0, REGISTER)
    backward = launches(kernels, ADJOINT)
    assert sorted(task for task, *_ in backward) == sorted([CHAIN] * 3 + [SMALL] * 5 + [REDUCE] * 3)   # no buffer is cleared
    assert all(task != REDUCE for task, *_ in launches(kernels, INNER))   # those write parameters


def test_every_instruction_runs_once_and_in_an_order_that_keeps_what_it_reads(emulated):
    model, x = mlp(2, 8, 7, 1), rand(9, 2).requires_grad_()

    def residuals():
        slopes = gradient(model(x), x)
        return gradient(slopes[:, 0].sum(), x)[:, 0] * slopes[:, 1]

    kernels, program = kernels_of(emulated, residuals, list(model.parameters()))
    for direction in (FORWARD, ADJOINT):
        run = []
        for task, what, _, _, links in launches(kernels, direction):
            run += [number for number, _ in links] if task == CHAIN else [] if task == CLEAR else [what]
        assert sorted(run) == list(range(len(program.instructions)))
        place = {number: k for k, number in enumerate(run)}
        for i, first in enumerate(program.instructions):   # what writes a buffer stays before what reads it
            for j, second in enumerate(program.instructions[i + 1 :], i + 1):
                if first.y == second.x:
                    assert (place[i] < place[j]) == (direction == FORWARD)
    chains = [links for task, *_, links in launches(kernels, FORWARD) if task == CHAIN]
    assert max(map(len, chains)) > 1 and max(map(len, chains)) <= 8


def test_lanes_that_meet_are_not_fused(emulated):
    """The second instruction reads, transposed, what the first has written."""
    buffers = [(0, 12), (2, 12), (1, 12)]
    first = Instruction(0, 1, 0, 0, 0, -1, 2.0, [[3, 4], [4, 1], [4, 1], [0, 0]])
    for strides, fused in (([4, 1], True), ([1, 3], False)):
        second = Instruction(0, 2, 0, 1, 0, -1, 3.0, [[3, 4], [4, 1], strides, [0, 0]])
        program = Program(torch.float64, buffers, [first, second], live=[12, 12, 12], residual_shapes=[torch.Size([12])])
        kernels = cuda.Kernels(program, torch.float64, library=emulated)
        chains = [links for task, *_, links in launches(kernels, FORWARD) if task == CHAIN]
        assert [len(links) for links in chains] == ([2] if fused else [1, 1])
        kernels.bind([])
        v = rand(12)
        expected = 6 * (v if fused else v.view(4, 3).T.reshape(-1))
        assert torch.equal(kernels.jvp(v), expected)


def test_long_sums_are_split_and_long_products_go_to_the_blas(emulated):
    model, x = mlp(3, 5, 1), rand(5000, 3)
    kernels, _ = kernels_of(emulated, lambda: model(x), list(model.parameters()))
    backward = launches(kernels, ADJOINT)
    assert {splits for task, _, splits, *_ in backward if task == REDUCE} == {4}   # 5,000 elements in parts of 1,024 or more
    assert sum(task == BLAS for task, *_ in backward) == 2   # sums over 5,000 rows
    forward = launches(kernels, FORWARD)
    assert all(task != BLAS for task, *_ in forward)


def test_the_sweep_of_small_products_can_be_forced_to_the_blas(emulated, monkeypatch, on_cuda):
    monkeypatch.setenv("PGDFAST_SMALL_PRODUCT", "0")
    model = mlp(3, 5, 4, 2)
    for x in (rand(7, 3), rand(7, 6, 3), rand(3, 7)[:, :].t()):
        lin = pgdfast.linearize(lambda: model(x), model.parameters())  # noqa: B023
        assert {task for task, *_ in launches(lin.kernels(), FORWARD)} <= {CLEAR, CHAIN, BLAS}
        ref = pgdfast.reference.linearize(lambda: model(x), model.parameters())  # noqa: B023
        v, u = rand(lin.num_parameters), rand(lin.num_residuals)
        assert torch.allclose(lin.jvp(v), ref.jvp(v)) and torch.allclose(lin.vjp(u), ref.vjp(u))


@pytest.mark.parametrize(("order", "wide", "processors", "tile"), [
    (100, 0, 132, 2), (1920, 0, 132, 2), (2048, 0, 132, 8), (8192, 0, 132, 8), (960, 1, 132, 2), (1024, 1, 132, 4),
])
def test_tiles(emulated, order, wide, processors, tile):
    """The large tile where it gives every multiprocessor at least one."""
    assert emulated.gram_tile(order, wide, processors) == tile


def test_a_description_that_does_not_end_well_is_refused(emulated):
    words = torch.tensor([1, 0], dtype=torch.int64)
    assert emulated.new(1, words.data_ptr(), 2, None, 0) is None
    assert b"ends early" in emulated.error()
    words = torch.tensor([0, 0, 7], dtype=torch.int64)
    assert emulated.new(1, words.data_ptr(), 3, None, 0) is None
    assert b"left over" in emulated.error()
