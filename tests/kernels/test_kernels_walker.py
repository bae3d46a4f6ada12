"""The core's small helpers for a step: recognizing tapes, copying tensors, the state of PyTorch's generator."""

import pytest
import torch
from helpers import mlp, rand

from pgdfast.kernels import native

core = native._C
pytestmark = pytest.mark.skipif(core is None, reason="the C++ core is not built")


def hook(gradient):
    return 3 * gradient


def network():
    model, x = mlp(2, 3, 1), rand(4, 2)
    return model, x, core.Walker(list(model.parameters()))


def add_hook(kind, hidden, model):
    """A hook of one kind, on the hidden layer or on a leaf; its handle."""
    if kind == "tensor":
        return hidden.register_hook(hook)
    if kind == "node, before":
        return hidden.grad_fn.register_prehook(lambda gradients: gradients)
    if kind == "node, after":
        return hidden.grad_fn.register_hook(lambda inputs, outputs: None)
    if kind == "parameter":
        return model[0].weight.register_hook(hook)
    return model[0].weight.register_post_accumulate_grad_hook(lambda p: None)


@pytest.mark.parametrize("kind", ["tensor", "node, before", "node, after", "parameter", "accumulated"])
def test_hooks_on_the_way_to_a_parameter_are_found(kind):
    model, x, walker = network()
    plain, _, nodes, hooked = walker.walk([model(x)])
    assert hooked == []
    hidden = model[:2](x)
    handle = add_hook(kind, hidden, model)
    out = model[2:](hidden)
    number, fresh, nodes, hooked = walker.walk([out])
    assert number != plain and fresh and len(hooked) == 1
    owner = nodes[hooked[0]]
    if kind in ("parameter", "accumulated"):
        assert owner.variable is model[0].weight
    else:
        assert owner is hidden.grad_fn
    handle.remove()
    assert walker.walk([out])[0] == plain   # the empty dictionary that stays behind does nothing


def test_hooks_that_no_gradient_of_a_parameter_meets_are_left_alone():
    model, x, walker = network()
    data = x.clone().requires_grad_()
    other = data * 2
    other.register_hook(hook)
    hidden = model[0](x)
    hidden.retain_grad()
    assert walker.walk([hidden + other.sum()])[3] == []


def user_function(name):
    """A Function of this name."""
    def forward(ctx, x):
        return x.clone()

    def backward(ctx, g):
        return g

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def test_functions_of_one_name_are_different_structures():
    _, _, walker = network()
    p = torch.ones(3, requires_grad=True)
    first, second = user_function("Exp"), user_function("Exp")
    numbers = [walker.walk([function.apply(p)])[0] for function in (first, second, first)]
    assert numbers[0] == numbers[2] != numbers[1]


def test_the_walker_says_when_it_has_forgotten_all_structures():
    p = torch.ones(1000, requires_grad=True)
    walker = core.Walker([p])
    generations = []
    for n in range(1, 601):
        number, _, _, _ = walker.walk([p[:n] * 2])
        assert number == n - 1   # numbers are never used twice
        generations.append(walker.generation)
    assert generations[0] == 0 and generations[-1] == 2
    before = walker.walk([p[:600] * 2])[0]
    assert before == 599


def test_copies_are_exact_and_seen_by_autograd():
    a = [rand(3, 2), rand(0), rand(5, dtype=torch.float32)]
    b = [torch.zeros_like(t) for t in a]
    versions = [t._version for t in b]
    assert core.copy_tensors(b, a)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert [t._version for t in b] == [v + 1 for v in versions]


@pytest.mark.parametrize("bad", [
    lambda: torch.zeros(2, 3, dtype=torch.float64), lambda: torch.zeros(5), lambda: torch.zeros(6, dtype=torch.float64)[::2],
    lambda: torch.zeros(4, device="meta"),
], ids=["size", "dtype", "strided", "device"])
def test_what_cannot_be_copied_is_refused_whole(bad):
    first, target = torch.zeros(2), bad()
    assert not core.copy_tensors([first, target], [torch.ones(2), torch.ones(5, dtype=torch.float64)])
    assert not first.any() and first._version == 0
    assert not core.copy_tensors([first], [])
