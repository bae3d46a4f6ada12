"""Every option of LM works for ensembles: members train as they would alone, on every backend, beside one that is lost."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYWHERE, NOISY_SINE, apart, losses_of, memory_of, networks_of, nudged, stack_of

import pgdfast
from pgdfast import Delayed, GainRatio, Longest, Sweep

B, LOST, STEPS = 3, 1, 5
ALIVE = [b for b in range(B) if b != LOST]
X, Y = NOISY_SINE


class Shortest:
    """A search that looks at three lengths and takes the best, not the last."""

    def search(self, loss, slope):
        seen = {}
        for t in (1.0, 0.5, 0.25):
            seen[t] = yield t
        best = min(seen, key=seen.get)
        return best if seen[best] < loss else None


class Round:
    """An acceleration of one's own: one chord round, wherever it leads."""

    def correct(self, model, delta):
        yield delta
        e = delta + model.correction(model.missed())
        return e, (yield e)


TINY = dict(damping=1e-2, damping_rule=Delayed(smallest=1e-3))   # rejections at many steps
SOLVES, TRUNCATED = pgdfast.CG(500, 1e-13), pgdfast.CG(60, 1e-12, truncate=True)
OPTIONS = {
    "default": TINY,
    "geodesic": TINY | dict(acceleration="geodesic"),
    "chord": TINY | dict(acceleration="chord"),
    "chord, gain ratio": dict(damping_rule=GainRatio(smallest=1e-2), acceleration="chord", scaling="marquardt"),
    "correction of one's own": TINY | dict(acceleration=Round(), solver="primal"),
    "correction of one's own, constant": dict(
        damping=0.3, damping_rule="constant", acceleration=Round(), weight_decay=0.01, lr=0.5
    ),
    "chord by CG": dict(damping_rule=GainRatio(smallest=0.1), acceleration="chord", solver="cg", cg=SOLVES),
    "momentum": TINY | dict(momentum=0.7, lr=0.5),
    "momentum, constant": dict(damping=0.3, damping_rule="constant", momentum=0.7, lr=0.3, scaling="marquardt"),
    "norm constraint": TINY | dict(norm_constraint=0.05),
    "everything": TINY | dict(acceleration=Round(), momentum=0.7, norm_constraint=0.05, scaling="marquardt", lr=0.5),
    "longest": dict(damping=1e-2, damping_rule=Longest(smallest=1e-3)),
    "longest, chord": dict(damping=1e-2, damping_rule=Longest(0.25, smallest=1e-3), acceleration="chord"),
    "sweep": dict(damping=0.1, damping_rule=Sweep(smallest=1e-2)),
    "sweep with momentum": dict(damping=0.1, damping_rule=Sweep(smallest=1e-2), momentum=0.5, norm_constraint=0.1),
    "sweep, primal": dict(damping=0.1, damping_rule=Sweep(smallest=1e-2), solver="primal", scaling="marquardt"),
    "truncation": dict(damping=1e-3, damping_rule=GainRatio(smallest=1e-3), solver="cg", cg=TRUNCATED),
    "search of one's own": TINY | dict(line_search=Shortest()),
    "armijo": TINY | dict(line_search="armijo", momentum=0.3),
}


def with_a_lost_member():
    """An ensemble whose member LOST has NaN for a parameter, and a copy of that member's parameters."""
    networks = stack_of(B)
    with torch.no_grad():
        next(iter(networks.parameters()))[LOST] = math.nan
    return networks, [p.detach()[LOST].clone() for p in networks.parameters()]


def groups_of(parameters):
    """Two groups with learning rates of their own."""
    parameters = list(parameters)
    return [{"params": parameters[:2], "lr": 0.4}, {"params": parameters[2:], "lr": 0.8}]


def trained_as_alone(options, backend, groups=list, steps=STEPS):
    """Train an ensemble and its members alone; compare every step, and return all reports of the ensemble."""
    options = {"solver": "dual"} | options | {"backend": backend}   # "auto" may choose otherwise among members' rows
    networks, lost = with_a_lost_member()
    alone, twins = networks_of(B), [nudged(m) for m in networks_of(B)]
    optimizer = pgdfast.LM(groups(networks.parameters()), ensemble=B, **options)
    own, others = ([pgdfast.LM(groups(m.parameters()), **options) for m in each] for each in (alone, twins))
    reports = []
    for _ in range(steps):
        before = optimizer.step(losses_of(networks))
        reports.append(optimizer.report)
        for b in ALIVE:
            loss = own[b].step(functools.partial(lambda m: F.mse_loss(m(X), Y), alone[b]))
            others[b].step(functools.partial(lambda m: F.mse_loss(m(X), Y), twins[b]))
            bound = max(1e-10, 100 * apart(alone[b], twins[b]))
            assert apart(networks.member(b), alone[b]) < bound < 1e-5
            assert abs(float(before[b]) - float(loss)) < bound
            report, wanted = optimizer.report[b], own[b].report
            assert (report.status, report.attempts, report.solver) == (wanted.status, wanted.attempts, wanted.solver)
            assert report.solve_status == wanted.solve_status and report.line_search == wanted.line_search
            if not own[b]._options.rule.sweeps:   # one network's K trials are one run of the closure
                assert report.trials == wanted.trials
            for name in ("damping", "next_damping", "loss_after", "momentum", "correction"):
                ours, theirs = getattr(report, name), getattr(wanted, name)
                assert ours == theirs or ours == pytest.approx(theirs, rel=1e-4, abs=1e-9), name
        assert math.isnan(float(before[LOST])) and optimizer.report[LOST].status == "failed"
    for p, kept in zip(networks.parameters(), lost, strict=True):
        assert torch.equal(p[LOST].detach().nan_to_num(7), kept.nan_to_num(7)) and p.requires_grad
    return reports


SLOWLY = ("default", "geodesic", "chord", "momentum, constant", "everything", "sweep", "truncation", "armijo")   # reference


@pytest.mark.parametrize(("name", "backend"), [
    (name, backend) for name in OPTIONS for backend in EVERYWHERE if backend != "reference" or name in SLOWLY
])
def test_members_train_as_they_would_alone(name, backend):
    reports = trained_as_alone(OPTIONS[name], backend, steps=3 if backend == "reference" else STEPS)
    attempts = [[report[b].attempts for b in ALIVE] for report in reports]
    if name in ("default", "longest", "chord", "momentum"):
        assert any(len(set(each)) > 1 for each in attempts), "some members should have waited for others"
    if OPTIONS[name].get("acceleration") not in (None, "geodesic"):
        assert max(report[b].correction for report in reports for b in ALIVE) > 1e-4
    if name == "truncation" and backend == "native":
        assert any(report[b].solve_status == "truncated" for report in reports for b in ALIVE)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", ["default", "chord", "momentum", "norm constraint", "sweep", "armijo"])
def test_groups_with_rates_of_their_own(name, backend):
    """Predictions then take products with J, while other members stand at their trial points."""
    trained_as_alone({k: v for k, v in OPTIONS[name].items() if k != "lr"}, backend, groups_of, 2)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_trials_count_the_runs_of_the_closure(backend):
    networks, runs = stack_of(B), []

    def closure():
        runs.append(1)
        return losses_of(networks)()

    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, damping_rule="sweep", backend=backend)
    optimizer.step(closure)
    found = len(runs) - (1 if backend != "reference" else 1 + B)   # the linearization, or one for each member and the losses
    assert found == max(optimizer.report.trials) == 5 * max(optimizer.report.attempts)


def test_a_sweep_keeps_a_damping_for_each_member():
    networks = stack_of(B)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, damping=[1e-3, 0.1, 10.0], damping_rule="sweep")
    for _ in range(3):
        optimizer.step(losses_of(networks))
    mus = [m["damping"] for m in memory_of(optimizer)["members"]]
    assert len(set(mus)) == B and mus == optimizer.report.next_damping


@pytest.mark.parametrize("name", ["chord", "everything", "sweep with momentum", "momentum, constant"])
def test_members_part_and_join_in_the_middle(name):
    """state_dicts of members, momentum and scale included, go on alone and come back."""
    options, networks = OPTIONS[name], stack_of(2)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=2, **options)
    for _ in range(2):
        optimizer.step(losses_of(networks))
    states, alone = copy.deepcopy(optimizer.member_state_dicts()), [copy.deepcopy(networks.member(b)) for b in range(2)]
    own = [pgdfast.LM(m.parameters(), **options) for m in alone]
    for o, state in zip(own, states, strict=True):
        o.load_state_dict(state)
    expected = optimizer.step(losses_of(networks))
    for b in range(2):
        torch.testing.assert_close(own[b].step(lambda b=b: F.mse_loss(alone[b](X), Y)), expected[b], rtol=1e-9, atol=0)
    pair = pgdfast.functional_ensemble(alone)
    again = pgdfast.LM(pair.parameters(), ensemble=2, **options)
    again.load_member_state_dicts([o.state_dict() for o in own])
    for _ in range(2):
        torch.testing.assert_close(again.step(losses_of(pair)), optimizer.step(losses_of(networks)), rtol=1e-7, atol=0)


def test_a_cross_entropy_is_refused_with_acceleration_and_nothing_is_changed():
    networks, labels = pgdfast.functional_ensemble([torch.nn.Linear(1, 3).double() for _ in range(B)]), torch.arange(24) % 3
    before = [p.detach().clone() for p in networks.parameters()]

    def closure():
        return torch.stack([F.cross_entropy(out, labels) for out in networks(X)])

    for backend in EVERYWHERE:
        optimizer = pgdfast.LM(networks.parameters(), ensemble=B, acceleration="chord", backend=backend)
        with pytest.raises(ValueError, match="cross-entropy.*nothing was changed.*acceleration=None"):
            optimizer.step(closure)
        assert all(torch.equal(p, q) for p, q in zip(networks.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{"acceleration": "chord"}, {"damping_rule": "sweep"}, {"momentum": 0.5}], ids=str)
@pytest.mark.parametrize("when", [2, 3, 4])
def test_exceptions_leave_every_member_as_before(when, options):
    networks, runs = stack_of(B), []
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, damping=1e-6, **options)
    before, state = [p.detach().clone() for p in networks.parameters()], None

    def closure():
        runs.append(1)
        if len(runs) == when:
            raise KeyboardInterrupt
        return losses_of(networks)()

    try:
        optimizer.step(closure)
    except KeyboardInterrupt:
        assert all(torch.equal(p, q) for p, q in zip(networks.parameters(), before, strict=True))
        assert memory_of(optimizer)["step"] == 0 and state is None
    else:
        assert len(runs) < when
