"""A step by operations on tensors alone: it asks the device for no number, and the report comes when it is read."""

import pytest
import torch
from helpers import LOSSES, fit_by, sine_fit
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pgdfast


class NoTransfer(TorchDispatchMode):
    """Refuses copies from one device to another."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if isinstance(args[0], float):   # modes are given a number in place of a 0-dim tensor that holds one
            return args[0] if function is torch.ops.aten._local_scalar_dense.default else torch.tensor(args[0])
        found = function(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor) and a.dim()]
        if isinstance(found, torch.Tensor) and any(a.device != found.device for a in given):
            raise AssertionError(f"{function} moves a tensor from {given[0].device} to {found.device}")
        return found


def on_meta(name, solver, rule):
    """A captured step whose tensors have shapes and no values, so that nothing can ask for one; its way found on the CPU."""
    lm, closure = fit_by(name, solver=solver, damping_rule=rule)
    real = pgdfast.CapturedStep(lm, closure)
    real.step()
    lm, closure = fit_by(name, "meta", solver=solver, damping_rule=rule, backend="torch")
    lm._memory()["members"][0].update(curvature=1.0, damping=None if rule == "constant" else 1e-2)   # which ask for values
    step = pgdfast.CapturedStep(lm, closure)
    step._numbers.plan = real._numbers.plan
    return step


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
def test_a_step_asks_for_no_value(name, solver, rule):
    step = on_meta(name, solver, rule)
    step.step()   # makes the tables
    with NoTransfer():
        step._numbers.take()


def test_the_check_for_values_and_transfers_can_fail():
    step = on_meta("residuals", "dual", "gain-ratio")
    step.step()
    with pytest.raises(RuntimeError, match="meta"):
        step._numbers._linearizer.read(step._numbers._closure())
    with pytest.raises(AssertionError, match="moves a tensor"), NoTransfer():
        torch.zeros(3).to("meta")
    closure = step._numbers._closure
    step._numbers._closure = lambda: closure() if float(closure()[0].sum()) else None
    with pytest.raises(RuntimeError, match="meta"):
        step._numbers.take()


class Counting(TorchFunctionMode):
    """Counts what brings numbers to the host."""

    WORDS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.WORDS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_the_report_comes_in_one_transfer_when_it_is_read():
    _, lm, closure = sine_fit()
    step = pgdfast.CapturedStep(lm, closure)
    step.step()
    with Counting() as mode:
        step.step()
        first = lm.report
        step.step()
        assert mode.seen == []
        assert first.loss > lm.report.loss   # each keeps the numbers of its own step
        assert lm.report.status == "accepted" and lm.report.residuals == 40 and "mu" in str(lm.report)
        assert mode.seen == ["tolist", "tolist"]
        lm.step(closure)
        assert len(mode.seen) > 2
    with pytest.raises(AttributeError, match="no 'lose'"):
        _ = first.lose
