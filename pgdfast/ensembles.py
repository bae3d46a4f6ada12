"""Many networks of one shape as one module, for pgdfast.LM(..., ensemble=B)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.overrides import TorchFunctionMode


class Ensemble(nn.Module):
    """B networks whose parameters are stacked on a first dimension.

    members: modules of one structure; their values are copied. Attributes: count B; parameters named as the members' are, with
    dots as underscores. Raises ValueError for members whose parameters or buffers differ in name, shape or dtype.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        _check_alike(members)
        self.count = len(members)
        parameters, buffers = stack_module_state(list(members))
        self._names = {name: name.replace(".", "_") for name in (*parameters, *buffers)}
        trained = {name for name, p in members[0].named_parameters() if p.requires_grad}
        for name, p in parameters.items():
            self.register_parameter(self._names[name], nn.Parameter(p.detach().contiguous(), requires_grad=name in trained))
        for name, buffer in buffers.items():
            self.register_buffer(self._names[name], buffer)
        # One member without values, hidden from this module's own parameters.
        object.__setattr__(self, "_member", copy.deepcopy(members[0]).to("meta"))

    def stacked(self) -> dict[str, torch.Tensor]:
        """{name in a member: parameters or buffers of all, (B, ...)}, as torch.func.functional_call takes those of one."""
        return {name: getattr(self, own) for name, own in self._names.items()}

    def forward(self, *inputs, each: bool = False):
        """The members' outputs, (B, ...).

        inputs: what a member takes, the same for all; each: inputs have a first dimension of B, one for every member. Data-
        dependent control flow and in-place work on what is not the member's own raise torch.vmap's errors.
        """
        def one(values, *inputs):
            with _Linear():
                return functional_call(self._member, values, inputs)

        dims = (0, *[0 if each else None] * len(inputs))
        return torch.vmap(one, in_dims=dims, randomness="different")(self.stacked(), *inputs)

    def map(self, function: Callable, *arguments, each: bool = False):
        """function(network, *arguments) for every member at once, (B, ...): losses and residuals of any form.

        network: a member, to be called as often as need be, also inside torch.func's transforms. each: as in forward.
        """
        def one(values, *arguments):
            with _Linear():
                return function(lambda *inputs: functional_call(self._member, values, inputs), *arguments)

        dims = (0, *[0 if each else None] * len(arguments))
        return torch.vmap(one, in_dims=dims, randomness="different")(self.stacked(), *arguments)

    def member(self, b: int) -> nn.Module:
        """An ordinary module with a copy of member b's values."""
        if not -self.count <= b < self.count:
            raise IndexError(f"pgdfast.Ensemble.member: there is no member {b}; they are numbered 0 to {self.count - 1}.")
        first = next(iter(self.stacked().values()))
        module = copy.deepcopy(self._member).to_empty(device=first.device)
        own = dict((*module.named_parameters(), *module.named_buffers()))   # also those that no state_dict has
        with torch.no_grad():
            for name, value in self.stacked().items():
                own[name].copy_(value[b])
        return module

    def __deepcopy__(self, memo):
        """A copy with values of its own."""
        return Ensemble([self.member(b) for b in range(self.count)])


def functional_ensemble(module, count: int | None = None) -> Ensemble:
    """An Ensemble of `count` networks made from an ordinary module.

    module: an nn.Module, of which member 0 is a copy and the others are drawn anew by its layers' reset_parameters, from
    torch's random numbers as `count - 1` further modules would be; or a function b -> nn.Module; or a list of modules. Use

        networks = pgdfast.functional_ensemble(model, 64)
        optimizer = pgdfast.LM(networks.parameters(), ensemble=64)
        optimizer.step(lambda: ((networks(x) - y) ** 2).mean((1, 2)))

    Raises ValueError for a count below 1, for members that differ in shape, and for a module with parameters that cannot be
    drawn anew.
    """
    if isinstance(module, Sequence):
        members = list(module)
        count = len(members) if count is None else count
        if len(members) != count:
            raise ValueError(f"pgdfast.functional_ensemble: {len(members)} modules were given for count={count}.")
    if not isinstance(module, Sequence) and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"pgdfast.functional_ensemble: count is {count!r}; it must be the number of members, 1 or more.")
    if isinstance(module, nn.Module):
        members = [module, *(_redrawn(module) for _ in range(count - 1))]
    elif not isinstance(module, Sequence):
        members = [module(b) for b in range(count)]
    return Ensemble(members)


class _Linear(TorchFunctionMode):
    """Linear layers under vmap as one batched product that adds the bias; vmap's own form takes another pass for it."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is nn.functional.linear and not keywords and len(arguments) == 3:
            result = _batched_linear(*arguments)
            if result is not None:
                return result
        return function(*arguments, **(keywords or {}))


def _batched_linear(x, weight, bias):
    """X W^T + b for an input of matrices whose members vmap keeps apart; None where it is anything else."""
    functorch = torch._C._functorch
    level = functorch.maybe_current_level()
    if bias is None or level is None or not all(map(functorch.is_batchedtensor, (weight, bias))):
        return None
    if functorch.maybe_get_level(weight) != level or functorch.maybe_get_level(bias) != level:
        return None
    own = functorch.is_batchedtensor(x) and functorch.maybe_get_level(x) == level
    inner, W, b = (functorch.get_unwrapped(t) if batched else t for t, batched in ((x, own), (weight, True), (bias, True)))
    if x.dim() != 2 or any(functorch.is_batchedtensor(t) or functorch.is_gradtrackingtensor(t) for t in (inner, W, b)):
        return None
    if any(functorch.maybe_get_bdim(t) != 0 for t in ((weight, bias, x) if own else (weight, bias))):
        return None
    inner = inner if own else inner.expand(len(W), *inner.shape)
    return functorch._add_batch_dim(torch.baddbmm(b.unsqueeze(1), inner, W.transpose(1, 2)), 0, level)


def _redrawn(module: nn.Module) -> nn.Module:
    """A copy whose parameters are drawn anew."""
    drawn = copy.deepcopy(module)
    for name, layer in drawn.named_modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"pgdfast.functional_ensemble: {type(layer).__name__} ({name or 'the module itself'}) has parameters but no "
                "reset_parameters() to draw them anew; give a function b -> module that makes member b."
            )
    return drawn


def _check_alike(members: Sequence[nn.Module]) -> None:
    if not members:
        raise ValueError("pgdfast.functional_ensemble: no modules were given; an ensemble needs one or more.")
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in members[0].state_dict().items()}
    for b, member in enumerate(members):
        found = {name: (tuple(t.shape), t.dtype) for name, t in member.state_dict().items()}
        for name in (*wanted, *found):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"pgdfast.functional_ensemble: member {b} has {name} as {found.get(name)}, member 0 as {wanted.get(name)}; "
                    "all members need the same parameters. Train networks of different shapes apart."
                )
