"""An exception at any Python line of a step: the parameters are those of before or of after it, and the next steps go on."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import losses_of, mlp, rand, stack_of
from torch.overrides import TorchFunctionMode

import pgdfast

HERE, LIBRARY = os.path.abspath(__file__), os.path.dirname(os.path.abspath(pgdfast.__file__)) + os.sep
FIRST, STEPS = 2, 2   # steps before the one that is interrupted; steps after it


class Interruption(BaseException):
    """What is raised at a line."""


def network():
    """A fit on points that every call draws: parameters and closure."""
    model, y = mlp(2, 5, 1), rand(8, 1, seed=2)

    def closure():
        x = torch.rand(8, 2, dtype=torch.float64)
        return F.mse_loss(model(x), torch.sin(3 * x[:, :1]) + y)

    return list(model.parameters()), closure


def ensemble():
    """Three networks, whose noisy targets ask them for different dampings."""
    networks = stack_of(3)
    return list(networks.parameters()), losses_of(networks)


SETTINGS = {   # problem, options of LM
    "default": (network, {}),
    "constant": (network, {"damping_rule": "constant"}),
    "sweep": (network, {"damping_rule": "sweep", "damping": 1e-4}),
    "armijo": (network, {"line_search": "armijo", "damping": 1e-5}),
    "chord, marquardt": (network, {"acceleration": "chord", "scaling": "marquardt", "damping": 1e-4}),
    "momentum, constraint, decay": (
        network, {"momentum": 0.8, "norm_constraint": 0.05, "weight_decay": 0.01, "lr": 0.5, "damping": 1e-4}
    ),
    "ensemble": (ensemble, {"ensemble": 3, "damping": 1e-3, "scaling": "marquardt", "momentum": 0.5, "weight_decay": 0.01}),
    "ensemble, armijo": (ensemble, {"ensemble": 3, "damping": 1e-5, "line_search": "armijo"}),
    "torch": (network, {"backend": "torch", "damping": 1e-4}),
    "cg": (network, {"solver": "cg", "damping": 1e-3}),
}


class Run:
    """One optimizer and what each of its steps leaves. Steps draw from a seed of their own."""

    def __init__(self, setting):
        problem, options = SETTINGS[setting]
        self.params, self.closure = problem()
        self.optimizer = pgdfast.LM(self.params, **options)
        self.number = 0

    def step(self):
        """Take the next step; return everything that it leaves, comparable by ==."""
        torch.manual_seed(self.number)
        loss = self.optimizer.step(self.closure)
        self.number += 1
        report = self.optimizer.report
        return loss.tolist(), self.values(), report.status, report.damping, report.next_damping, report.attempts, report.trials

    def values(self):
        """The bits of all parameters."""
        return [p.detach().numpy().tobytes() for p in self.params]


def interrupted(call, at):
    """Run `call`, raising at line number `at` of the library or closure; where that was, or how many there are if none was."""
    seen, where = 0, None

    def trace(frame, event, argument):
        nonlocal seen, where
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        if function == "__del__":   # Python ignores exceptions there
            return None
        if not (name.startswith(LIBRARY) or (name == HERE and function == "closure")):
            return None
        if event == "line":
            if seen == at:
                where = f"{name.removeprefix(LIBRARY)}:{frame.f_lineno} ({function})"
                seen += 1
                raise Interruption
            seen += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interruption:
        return where
    finally:
        sys.settrace(before)
    return seen


def undisturbed(setting):
    """What the steps of a run leave, and (values, generator) before and after the step that is to be interrupted."""
    run, steps = Run(setting), []
    for _ in range(FIRST):
        run.step()
    torch.manual_seed(FIRST)
    before = run.values(), torch.get_rng_state()
    for _ in range(STEPS + 2):
        steps.append(run.step())
        if len(steps) == 1:
            after = run.values(), torch.get_rng_state()
    return steps, before, after


def faults(setting, places, known=None):
    """What is wrong after an interruption at each of these lines, in words."""
    steps, before, after = known or undisturbed(setting)
    found = []
    for at in places:
        run = Run(setting)
        for _ in range(FIRST):
            run.step()
        torch.manual_seed(FIRST)
        where = interrupted(lambda run=run: run.optimizer.step(run.closure), at)
        if isinstance(where, int):
            break
        values = run.values()
        if not torch.is_grad_enabled() or torch._C._len_torch_function_stack():
            found.append(f"{where}: gradients are disabled, or a mode is still there")
            torch.set_grad_enabled(True)
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()
        if not all(p.requires_grad and p.is_leaf for p in run.params):
            found.append(f"{where}: a parameter does not require a gradient")
        if values not in (before[0], after[0]):
            found.append(f"{where}: the parameters are neither those of before nor those of after")
            continue
        if not any(torch.equal(torch.get_rng_state(), state) for _, state in (before, after)):
            found.append(f"{where}: the generator is neither where it was nor where one evaluation leaves it")
        done = int(values == after[0] and values != before[0])
        run.number = FIRST + done
        try:
            for expected in steps[done : done + STEPS]:
                if run.step() != expected:
                    found.append(f"{where}: later steps differ from those of an undisturbed run")
                    break
        except Exception as error:   # noqa: BLE001 - told with the others
            found.append(f"{where}: the next step ends in {error!r}")
    return found


def lines_of(setting):
    """How many lines a step has."""
    run = Run(setting)
    for _ in range(FIRST):
        run.step()
    torch.manual_seed(FIRST)
    return interrupted(lambda: run.optimizer.step(run.closure), -1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_exception_at_any_line_leaves_a_step_whole(setting):
    """Some of each setting, spread over the step; the slow test has them all."""
    lines, many = lines_of(setting), 6 if "ensemble" in setting else 30
    assert lines > 100
    assert faults(setting, range(3, lines, max(1, lines // many))) == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_exception_at_every_line_leaves_a_step_whole(setting):
    assert faults(setting, range(lines_of(setting))) == []


class Mode(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_contexts_that_an_exception_left_entered_end_with_the_step():
    """As one does that comes at the end of a `with`, before its context is left."""
    params, inner = network()
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            Mode().__enter__()
            torch.no_grad().__enter__()
            raise Interruption
        return inner()

    optimizer = pgdfast.LM(params)
    with Mode(), pytest.raises(Interruption):
        optimizer.step(closure)
    assert torch.is_grad_enabled() and torch._C._len_torch_function_stack() == 0
    optimizer.step(inner)
    assert optimizer.report.status == "accepted"


def test_the_check_can_fail():
    """With an undo that forgets one parameter."""
    undo = pgdfast.step.Parameters.all_back

    def forgets(self):
        kept = self.params[0].detach().clone()
        undo(self)
        with torch.no_grad():
            self.params[0].copy_(kept)

    known = undisturbed("default")
    pgdfast.step.Parameters.all_back = forgets
    try:
        assert any("neither those of before" in fault for fault in faults("default", range(100, 400, 10), known))
    finally:
        pgdfast.step.Parameters.all_back = undo
