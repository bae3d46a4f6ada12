"""What the optimizer remembers: its form, what of it may be loaded, copies; and numbers at the ends of their range."""

import copy
import math
import pickle

import pytest
import torch
from helpers import (
    EVERYWHERE,
    RULES,
    SOLVERS,
    Uphill,
    fit,
    flat,
    memory_of,
    mlp,
    rand,
    relative,
    snapshot,
    unchanged,
)

import pgdfast

X, Y = rand(12, 2, seed=1), rand(12, 1, seed=2)


# --- what is remembered ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_memory_is_one_step_count_and_one_entry_a_member(rule):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.3, damping_rule=rule, momentum=0.5, scaling="marquardt")
    for _ in range(2):
        optimizer.step(closure)
    state = optimizer.state_dict()["state"]
    member, = state[0]["members"]
    assert set(state[0]) == {"step", "members", "momentum", "scale"} and state[0]["step"] == 2
    assert all(set(state[k]) == {"momentum", "scale"} for k in (1, 2, 3))
    names = {"damping", "rule", "wide", "keep", "rejected", "momentum", "curvature", "scaled"}
    assert set(member) == names and member["momentum"] and member["scaled"]
    assert member["damping"] == (None if rule == "constant" else optimizer.report.next_damping)
    assert member["rule"] == ({"nu": 2.0} if rule == "gain-ratio" else {})


def loaded_wrongly(state, message, **options):
    """A state that is refused changes nothing: the next step is that of an optimizer that was never given it."""
    ends = []
    for load in (False, True):
        params, closure = fit()
        optimizer = pgdfast.LM(params, damping=0.3, **options)
        optimizer.step(closure)
        before, kept = str(optimizer.state_dict()), snapshot(params)
        if load:
            with pytest.raises(ValueError, match="pgdfast.LM: the loaded state " + message):
                optimizer.load_state_dict(state)
            assert str(optimizer.state_dict()) == before and unchanged(params, kept)
        optimizer.step(closure)
        ends.append(flat(params))
    assert torch.equal(*ends)


def stepped(**options):
    """The state_dict of an LM after a step."""
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.3, **options)
    optimizer.step(closure)
    return optimizer.state_dict()


@pytest.mark.parametrize(("saved", "loaded"), [
    ("delayed", "gain-ratio"), ("gain-ratio", "delayed"), ("gain-ratio", "sweep"), ("constant", "delayed"),
    ("sweep", "constant"), ("constant", "gain-ratio"),
])
def test_the_state_of_another_rule_is_refused(saved, loaded):
    message = rf"was saved under damping_rule=.*'{saved}'.*, and this LM has \w+; make the LM with the damping_rule"
    loaded_wrongly(stepped(damping_rule=saved), message, damping_rule=loaded)


def test_the_former_default_says_how_its_states_go_on():
    """A state from before the rule "auto": the message names the former default, and a LM made so takes it."""
    former = {"damping": 0.1, "rule": {"nu": 4.0}, "wide": False, "keep": {}, "rejected": 0, "momentum": False}
    state = stepped()
    state["state"][0] = {"step": 3, "members": [former]}
    loaded_wrongly(state, "was saved under .*'gain-ratio' .the former default, with acceleration=None., and")
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping_rule="gain-ratio", acceleration=None)
    optimizer.load_state_dict(state)
    optimizer.step(closure)
    assert optimizer.report.damping == 0.1 and optimizer.report.status == "accepted"
    p = torch.ones(2, dtype=torch.float64, requires_grad=True)   # whose units ask for Marquardt's D, which mu did not know
    optimizer = pgdfast.LM([p], damping_rule="gain-ratio", acceleration=None)
    optimizer.load_state_dict({"state": {0: state["state"][0]}, "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.step(lambda: torch.stack([1e4 * p[0] - 1, 1e-4 * p[1] - 1]))
    assert optimizer.report.scaling == "identity"


def test_rules_that_remember_the_same_take_each_others_state():
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping_rule="sweep")
    optimizer.load_state_dict(stepped(damping_rule="delayed"))
    assert memory_of(optimizer)["members"][0]["damping"] < 0.3
    optimizer.step(closure)
    assert optimizer.report.status == "accepted"


def test_states_of_other_kinds_are_refused():
    state = stepped()
    state["state"][0] = {"step": 3, "damping": 0.1, "wide": False}   # as an earlier version wrote it
    loaded_wrongly(state, "is not one of pgdfast.LM of this version; load one that LM.state_dict")
    networks = pgdfast.functional_ensemble([mlp(2, 6, 1, seed=b) for b in range(3)])
    many = pgdfast.LM(networks.parameters(), ensemble=3)
    many.step(lambda: networks(X) - Y)
    loaded_wrongly(many.state_dict(), r"is that of 3 member\(s\) and this LM trains 1; load one of as many")


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_damping_beyond_the_type_works_or_is_one_sentence(rule, solver, dtype):
    params, closure = fit(dtype)
    before, optimizer = snapshot(params), pgdfast.LM(params, damping=1e300, damping_rule=rule, solver=solver)
    try:
        optimizer.step(closure)
    except ValueError as error:
        assert str(error).startswith("pgdfast") and "1e+300" in str(error)
        assert unchanged(params, before)
    else:
        assert all(p.isfinite().all() for p in params) and math.isfinite(optimizer.report.next_damping)
        assert relative(flat(params), flat(before)) < 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_an_empty_parameter_is_left_alone(backend, rule):
    ends = []
    for extra in (0, 1):
        params, closure = fit()
        empty = [torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)] * extra
        optimizer = pgdfast.LM(params + empty, damping=0.1, damping_rule=rule, backend=backend, momentum=0.5)
        for _ in range(3):
            optimizer.step(closure)
        assert optimizer.report.status == "accepted"
        ends.append(flat(params))
    assert relative(*ends) < 1e-12


def test_pickles_of_all_that_can_be_asked_for():
    """Own rules and searches included; with what was learnt of closures left behind."""
    own = pgdfast.Armijo(c=0.1)
    for options in ({"damping_rule": "sweep"}, {"acceleration": "chord", "momentum": 0.5}, {"line_search": own}):
        params, closure = fit()
        optimizer = pgdfast.LM(params, damping=0.3, **options)
        for _ in range(2):
            optimizer.step(closure)
        copied = pickle.loads(pickle.dumps(optimizer))
        assert copied.report == optimizer.report and str(copied.state_dict()) == str(optimizer.state_dict())


def test_a_step_that_is_undone_leaves_a_copy_nothing():
    closure = Uphill()
    optimizer = pgdfast.LM([closure.w], damping=1.0)
    optimizer.step(closure)
    assert copy.deepcopy(optimizer).report.status == "rejected" == pickle.loads(pickle.dumps(optimizer)).report.status
