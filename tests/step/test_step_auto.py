"""The rule that finds out whether corrections pay: its decisions on made-up numbers, its choice, and at work in LM."""

import copy
import itertools
import math
from collections import Counter

import bench_folder  # noqa: F401 - makes `bench` importable
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    fit_by,
    flat,
    losses_of,
    memory_of,
    mlp,
    networks_of,
    rand,
    relative,
    sine_fit,
    stack_of,
    through_a_file,
)

import pgdfast
from bench import poisson_2d
from pgdfast import reference
from pgdfast.report import Report
from pgdfast.solve import CG
from pgdfast.step import Chord, Geodesic, auto
from pgdfast.step.auto import MODES, Auto
from pgdfast.step.choice import RULES, chosen_together
from pgdfast.step.cost import StepCost, step_cost

PLAIN, PROBING, CORRECTED = MODES
COST = StepCost(linearize=10.0, attempt=1.0, trial=1.0, round=0.1)


class Told:
    """A rule that is told how much ln(loss) falls in a step, and in how many rounds of correction.

    mu: with a gain ratio of 1/2, Nielsen's rule leaves it. mus: of each step, before it begins and when it has. overspent:
    operations beyond those of plain steps for the same fall.
    """

    def __init__(self, rule=None, mu=0.7, cost=COST):
        self.rule, self.mu, self.cost, self.log, self.modes, self.overspent = rule or Auto(), mu, cost, 0.0, [], 0.0
        self.memory, self.total, self.mus = self.rule.memory(), 0.0, []

    def steps(self, count, plain, corrected, rounds=2, ratio=0.5, ends=True, jump=0.0):
        """Take steps. plain, corrected: their falls. ends: do corrections end in a step? jump: of ln(loss) between steps."""
        for k in range(count):
            loss = math.exp(-self.log)
            mu, memory = self.rule.begins(self.mu, self.memory, loss)
            bent = self.rule.corrects(memory)
            fall, extra = (corrected, rounds) if bent else (plain, 0)
            self.modes.append(self.rule.mode(memory))
            self.mus.append((self.mu, mu))
            report = Report(loss, loss * math.exp(-fall), ratio, attempts=1, trials=1 + extra, correction=0.1 * (bent and ends))
            self.mu, memory = self.rule.accepted(mu, memory, ratio)
            self.memory = self.rule.ended(memory, report, self.cost)
            spent = self.cost.of(1, 1 + extra)
            self.total += spent
            self.overspent += spent - self.cost.of(1, 1) * (fall / plain if plain else 0.0)
            self.log += fall + jump * (-1) ** k
        return self


@pytest.mark.parametrize(("falls", "after"), [
    ((0.1, 1.0), [PROBING] * auto._BLOCK + [CORRECTED] * 3),              # it pays: adopted
    ((0.1, 0.09), [PROBING] * auto._BLOCK + [PLAIN] * auto._FIRST),       # it does not: plain steps again
    ((0.1, 0.001), [PROBING] + [PLAIN] * auto._FIRST),                    # nor nearly: given up
    ((0.1, 0.0), [PROBING] + [PLAIN] * auto._FIRST),
    ((0.0, 0.1), [PROBING] * auto._BLOCK + [CORRECTED] * 3),
])
def test_a_probe_is_gone_on_with_where_it_pays(falls, after):
    run = Told().steps(auto._FIRST + len(after), *falls)
    assert run.modes == [PLAIN] * auto._FIRST + after
    if after[-1] == PLAIN:
        stood, returned = run.mus[run.modes.index(PLAIN, auto._FIRST)]
        poor = falls[1] < auto._GIVE_UP * falls[0]   # else halfway to where it was
        assert stood < 0.7 and returned == run.mu == (0.7 if poor else math.sqrt(stood * 0.7))
        assert run.memory["regret"] == pytest.approx(run.overspent, rel=1e-9)
    else:   # from mu / 3, and faster down than a plain step's mu
        assert run.mu < 0.7 / auto._PUSH / 3 ** (len(after) - 1) and run.memory["regret"] == 0


def test_no_probe_where_curvature_does_not_limit_the_step():
    assert set(Told().steps(100, 0.1, 1.0, ratio=0.97).modes) == {PLAIN}


def test_changes_of_the_batch_are_no_gains():
    steady, jumping = (Told().steps(60, 0.1, 0.3, jump=jump) for jump in (0.0, 2.0))
    assert CORRECTED in steady.modes and PROBING in jumping.modes and CORRECTED not in jumping.modes


def test_corrections_that_lead_to_no_step_are_dropped():
    run = Told().steps(auto._FIRST + auto._BLOCK + 3, 0.1, 1.0)
    assert run.modes[-1] == CORRECTED
    before, mu = len(run.modes), run.mu
    run.steps(20, 0.1, 1.0, ends=False)
    assert PLAIN in run.modes[before:] and run.modes[before:].index(PLAIN) < 10 and run.mu <= mu


def test_what_a_probe_raises_mu_to_is_kept():
    """Steps in vain raise it: where it returned to would be in vain, too."""
    run = Told().steps(auto._FIRST, 0.1, 0.1)
    loss = math.exp(-run.log)
    mu, memory = run.rule.begins(run.mu, run.memory, loss)
    assert run.rule.mode(memory) == PROBING and mu == 0.7 / auto._PUSH
    for _ in range(5):
        mu, memory = run.rule.rejected(mu, memory, -1.0, lambda: 1.0)
    memory = run.rule.ended(memory, Report(loss, status="rejected", attempts=6, trials=6), COST)
    after, memory = run.rule.begins(mu, memory, loss)
    assert run.rule.mode(memory) == PLAIN and after == mu > 0.7


@pytest.mark.parametrize("cost", [COST, COST._replace(round=1.0), COST._replace(round=30.0), COST._replace(linearize=1.0)])
@pytest.mark.parametrize(("corrected", "rounds"), [(0.1, 1), (0.05, 3), (0.0, 8)])
def test_probes_that_never_pay_cost_a_bounded_part(cost, corrected, rounds):
    run = Told(cost=cost).steps(200, 0.1, corrected, rounds)
    assert CORRECTED not in run.modes and 0 < run.mu <= 0.7
    assert run.overspent <= auto._LOSES * run.total + cost.of(1, 1 + rounds)   # the step that exceeded it
    again, before = Told(cost=cost), PLAIN
    for _ in range(200):
        overspent, total = again.overspent, again.total
        again.steps(1, 0.1, corrected, rounds)
        if again.modes[-1] == PROBING != before:   # where a probe begins
            assert overspent <= auto._REGRET * total
        before = again.modes[-1]
    if cost.round < 1:
        assert PROBING in run.modes


def test_what_interrupts_a_probe_ends_it():
    run = Told().steps(auto._FIRST + 2, 0.1, 1.0)
    assert run.modes[-1] == PROBING
    before = dict(run.memory)
    after = run.rule.interrupted(run.memory)
    assert run.memory == before and set(after) == set(before)
    assert run.rule.begins(0.01, after, 0.5) == (0.01, after) and run.rule.mode(after) == PLAIN   # nothing to return to
    assert run.rule.begins(0.01, before, 0.5, correctable=False) == (0.01, after)
    adopted = Told().steps(auto._FIRST + auto._BLOCK + 2, 0.1, 1.0)
    assert run.rule.mode(run.rule.interrupted(adopted.memory)) == CORRECTED
    assert run.rule.mode(run.rule.begins(0.1, adopted.memory, 0.5, correctable=False)[1]) == PLAIN


def test_probes_keep_to_the_smallest_mu():
    run = Told(Auto(smallest=0.6)).steps(60, 0.1, 1.0)
    assert CORRECTED in run.modes and run.mu == 0.6
    assert Told(Auto(smallest=0.6), mu=0.2).steps(auto._FIRST + 1, 0.1, 1.0).modes[-1] == PROBING


def test_gauss_newton_stays_gauss_newton():
    run = Told(mu=0.0).steps(auto._FIRST + auto._BLOCK + 2, 0.1, 1.0)
    assert run.modes[-1] == CORRECTED and run.mu == 0.0
    assert run.rule.rejected(0.0, run.memory, -1.0, lambda: 3.0)[0] == 3.0


# --- the choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("given", "found"), [
    ("auto", None), (None, None), ("chord", Chord()), ("geodesic", Geodesic()), (own := Chord(rounds=2), own),
])
@pytest.mark.parametrize("plain", [False, True])
def test_what_goes_together(rule, given, found, plain):
    chosen, acceleration = chosen_together(rule, given, plain)
    learns = rule == "auto" and found is None
    assert type(chosen) is (Auto if learns else pgdfast.GainRatio if rule == "auto" else RULES[rule])
    if learns and given == "auto" and not plain:
        assert isinstance(acceleration, Chord) and acceleration.enough < math.inf
    else:
        assert acceleration == found


def test_a_rule_object_that_learns_takes_any_correction():
    own = Auto(smallest=1e-3)
    assert chosen_together(own, "geodesic", False) == (own, Geodesic()) and chosen_together(own, "auto", True) == (own, None)
    assert isinstance(chosen_together(own, "auto", False)[1], Chord)


@pytest.mark.parametrize("options", [{"ensemble": 2}, {"line_search": "armijo"}, {"momentum": 0.5}, {"acceleration": None}, {}])
def test_options_that_steps_are_plain_with(options):
    optimizer = pgdfast.LM(stack_of(2).parameters(), **options)
    assert type(optimizer._options.rule) is Auto and (optimizer._options.acceleration is None) == bool(options)


# --- at work --------------------------------------------------------------------------------------------------------------


PLAINLY = dict(damping_rule="gain-ratio", acceleration=None)


def run(optimizer, closure, steps):
    """(losses, modes) of some steps."""
    losses, modes = [], []
    for _ in range(steps):
        losses.append(float(optimizer.step(closure)))
        modes.append(optimizer.report.mode)
    return losses, modes


def test_a_pinn_ends_in_corrected_steps():
    for seed in (0, 2):
        errors = []
        for options in ({}, PLAINLY):
            net, closure, error = poisson_2d.problem(poisson_2d.SMALL, seed)
            _, modes = run(pgdfast.LM(net.parameters(), **options), closure, 80)
            assert modes[-1] == ("" if options else CORRECTED)
            errors.append(error())
        assert errors[0] < 1e-5 and errors[1] > 5e-5


def test_probes_of_noisy_fits_cost_little():
    """By predicted operations. From its first probe on each run is another one than plain steps': hence several."""
    x, spent, counts = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None], Counter(), Counter()
    for seed, options in itertools.product(range(8), ({}, PLAINLY)):
        model, y = mlp(1, 20, 20, 1, seed=seed), torch.sin(5 * x) + rand(50, 1, seed=7 + seed)
        closure = lambda model=model, y=y: F.mse_loss(model(x), y)  # noqa: E731
        lin = pgdfast.linearize(closure, list(model.parameters()))
        cost, optimizer = step_cost(lin, pgdfast.solve(lin, 1e-3), CG()), pgdfast.LM(model.parameters(), **options)
        for _ in range(150):
            optimizer.step(closure)
            spent[optimizer.report.mode] += cost.of(optimizer.report.attempts, optimizer.report.trials)
            counts[optimizer.report.mode] += 1
        if not options:
            memory = memory_of(optimizer)["members"][0]["rule"]
            assert 0 < memory["regret"] <= auto._LOSES * memory["total"] + cost.of(3, 3 + 3 * 8)   # the step that exceeded it
    one = spent[""] / counts[""]
    assert spent[PLAIN] / counts[PLAIN] == pytest.approx(one, rel=0.05)
    assert spent[PROBING] - counts[PROBING] * one < 0.2 * spent[""]


def test_runs_repeat_bit_for_bit_however_often_they_are_resumed():
    ends = []
    for every in (100, 100, 7):
        model, optimizer, closure = sine_fit()
        losses, modes = [], []
        for k in range(49):
            if k and k % every == 0:
                state, optimizer = through_a_file(optimizer.state_dict()), pgdfast.LM(model.parameters())
                optimizer.load_state_dict(state)
            losses.append(float(optimizer.step(closure)))
            modes.append(optimizer.report.mode)
        ends.append((losses, modes, flat(model.parameters()).tolist(), memory_of(optimizer)["members"][0]["rule"]))
    assert ends[0] == ends[1] == ends[2] and set(ends[0][1]) == set(MODES)


@pytest.mark.parametrize("name", ["cross-entropy", "logistic"])
def test_losses_that_are_no_sums_of_squares_take_gain_ratios_steps(name):
    ends = []
    for options in ({}, PLAINLY):
        optimizer, closure = fit_by(name, **options)
        losses, modes = run(optimizer, closure, 30)
        assert set(modes) == {"" if options else PLAIN}
        ends.append((losses, flat(optimizer.param_groups[0]["params"]).tolist()))
    assert ends[0] == ends[1]


def test_a_loss_that_changes_its_form_leaves_corrected_steps():
    model, optimizer, closure = sine_fit()
    assert run(optimizer, closure, 40)[1][-1] == CORRECTED
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    loss = lambda: F.binary_cross_entropy_with_logits(model(x), 0.9 * (x > 0).double())  # noqa: E731
    twin = copy.deepcopy(model)
    plain = pgdfast.LM(twin.parameters(), damping=optimizer.report.next_damping, scaling="identity", **PLAINLY)
    memory_of(optimizer)["members"][0]["rule"]["nu"] = 2.0
    losses, modes = run(optimizer, loss, 10)
    assert set(modes) == {PLAIN} and losses == sorted(losses, reverse=True)
    same = lambda: F.binary_cross_entropy_with_logits(twin(x), 0.9 * (x > 0).double())  # noqa: E731
    assert run(plain, same, 10)[0] == pytest.approx(losses, rel=1e-9)
    assert set(run(optimizer, closure, 40)[1]) >= {PLAIN, PROBING}   # and tries again where it may


def test_members_take_gain_ratios_steps_and_go_on_alone_and_back():
    ends = []
    for options in ({}, PLAINLY):
        networks = stack_of(3)
        optimizer = pgdfast.LM(networks.parameters(), ensemble=3, **options)
        losses = [optimizer.step(losses_of(networks)).tolist() for _ in range(20)]
        assert set(optimizer.report.mode) == {"" if options else PLAIN}
        ends.append((losses, flat(networks.parameters()).tolist()))
        if not options:
            joined, last = networks, optimizer
    assert ends[0] == ends[1]
    alone, states, x = networks_of(3), [], torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None]
    for b, state in enumerate(last.member_state_dicts()):
        with torch.no_grad():
            for p, q in zip(alone[b].parameters(), joined.parameters(), strict=True):
                p.copy_(q[b].reshape(p.shape))
        single = pgdfast.LM(alone[b].parameters())
        single.load_state_dict(through_a_file(state))
        _, modes = run(single, lambda b=b: alone[b](x) - torch.sin(4 * x), 60)
        assert PROBING in modes
        states.append(single.state_dict())
    assert {MODES[int(memory["members"][0]["rule"]["mode"])] for memory in (s["state"][0] for s in states)} != {PLAIN}
    again = pgdfast.functional_ensemble(alone)
    back = pgdfast.LM(again.parameters(), ensemble=3)
    back.load_member_state_dicts(states)
    before = losses_of(again)().tolist()
    for _ in range(5):
        back.step(losses_of(again))
    assert set(back.report.mode) == {PLAIN} and all(a <= b for a, b in zip(losses_of(again)().tolist(), before, strict=True))


def test_captured_steps_are_gain_ratios_and_hand_over_both_ways():
    (model, optimizer, closure), (twin, other, same) = sine_fit(), sine_fit(**PLAINLY)
    step, plain = pgdfast.CapturedStep(optimizer, closure), pgdfast.CapturedStep(other, same)
    assert [float(step.step()) for _ in range(12)] == [float(plain.step()) for _ in range(12)]
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    losses, modes = run(optimizer, closure, auto._FIRST + 40)
    assert modes[: auto._FIRST] == [PLAIN] * auto._FIRST and PROBING in modes
    reached = optimizer.report.loss_after
    assert float(step.step()) == pytest.approx(reached, rel=1e-9) and optimizer.report.mode == ""
    losses += run(optimizer, closure, 5)[0]
    assert losses == sorted(losses, reverse=True) and set(memory_of(optimizer)["members"][0]["rule"]) == set(Auto().memory())


def test_the_reference_runs_with_the_defaults():
    curves = []
    for backend in ("native", "reference"):
        _, optimizer, closure = sine_fit(backend=backend)
        losses, modes = run(optimizer, closure, 25)
        assert set(modes) <= set(MODES) and losses == sorted(losses, reverse=True)
        curves.append(losses)
    assert relative(*map(torch.tensor, (losses[: auto._FIRST] for losses in curves))) < 1e-9


# --- what steps are predicted to cost -------------------------------------------------------------------------------------


def problem(points=30, width=8):
    """(parameters, closure) of a regression."""
    model, x = mlp(2, width, 1), rand(points, 2, seed=1)
    return list(model.parameters()), lambda: model(x) - torch.sin(3 * x[:, :1])


def cost_of(solver, backend="native", **sizes):
    params, closure = problem(**sizes)
    lin = pgdfast.linearize(closure, params, backend=backend)
    return step_cost(lin, pgdfast.solve(lin, 1e-2, solver=solver), CG())


@pytest.mark.parametrize("solver", ["dual", "primal", "cg", "lsmr", "eigh"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_costs_grow_with_what_a_step_does(solver, backend):
    cost = cost_of(solver, backend)
    assert min(cost) > 0 and cost == cost_of(solver, backend)   # on another tape, with nothing remembered
    table = [cost.of(attempts, attempts + rounds) for attempts in (1, 2, 12) for rounds in (0, 1, 8)]
    assert table == sorted(set(table)) or cost.round > cost.attempt + cost.trial
    for attempts in (1, 2, 12):
        assert cost.of(attempts, attempts) < cost.of(attempts, attempts + 1) < cost.of(attempts, attempts + 8)
        assert cost.of(attempts, attempts + 1) < cost.of(attempts + 1, attempts + 2)
        assert cost.of(attempts, 0) == cost.of(attempts, attempts)   # where solves failed, no trial was made
    larger = cost_of(solver, backend, points=300, width=32)
    assert all(a > b for a, b in zip(larger, cost, strict=True))


def test_costs_of_the_reference():
    params, closure = problem()
    lin = reference.linearize(closure, params)
    cost = step_cost(lin, reference.solve(lin, 1e-2), CG())
    assert min(cost) > 0 and cost.of(1, 2) > cost.of(1, 1)


@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_costs_are_the_same_after_a_reload(solver):
    params, closure = problem()
    first, second = (pgdfast.LM(params, solver=solver) for _ in range(2))
    run(first, closure, 5)
    state = through_a_file(first.state_dict())
    before = [p.detach().clone() for p in params]
    first.step(closure)
    expected = memory_of(first)["members"][0]["rule"]
    with torch.no_grad():
        for p, q in zip(params, before, strict=True):
            p.copy_(q)
    second.load_state_dict(state)
    second.step(closure)
    assert memory_of(second)["members"][0]["rule"] == expected and expected["cost"] > 0


def test_a_loss_whose_weights_change_is_not_compared():
    """With `balance`, the loss after new weights is another function: its fall says nothing of the step."""
    def problem():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1)).double()
        x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        return net, lambda: (net(x) - torch.sin(5 * x), 1e-3 * (net(x[:1]) - 1))

    net, closure = problem()
    optimizer = pgdfast.LM(net.parameters(), balance=pgdfast.Balance(every=4))
    costs, weights = [], []
    for _ in range(12):
        optimizer.step(closure)
        weights.append(optimizer.report.weights)
        memory, = optimizer.state_dict()["state"][0]["members"]
        costs.append(memory["rule"]["cost"])
    changed = [a != b for a, b in zip(weights, weights[1:], strict=False)]
    assert any(changed) and not all(changed)
    assert [cost == 0 for cost in costs[:-1]] == changed


def test_a_model_that_holds_lowers_mu_faster():
    """Two gain ratios of 1 in a row say that only mu is in the way; one does not, and 0.9 is not near enough."""
    def factor(*ratios):
        run = Told()
        for ratio in ratios:
            before = run.mu
            run.steps(1, 0.1, 0.1, ratio=ratio)
        return before / run.mu

    assert factor(1.0) == factor(0.5, 1.0) == factor(0.95, 1.0) == pytest.approx(3)
    assert factor(1.0, 1.02) == factor(0.98, 1.0) == pytest.approx(3 * auto._EAGER)
    assert factor(1.0, 0.9) < 3


def test_small_steps_over_noisy_batches_are_left_alone():
    """Where the loss jumps from batch to batch and gains nothing on the whole, little is probed, and mu not pushed."""
    noise, run = 0.3 * torch.randn(201, generator=torch.Generator().manual_seed(0)), Told()
    for jump in noise.diff().tolist():
        run.steps(1, 1e-3, 1e-3, jump=jump)
    assert run.modes.count(PLAIN) > 0.8 * len(run.modes)
    steady, jumping = (Told().steps(4, 0.3, 0.3, ratio=1.0, jump=jump).mu for jump in (0.0, 0.05))
    assert jumping > 3 * steady   # not lowered by more than Nielsen's rule does


def test_a_second_tape_is_not_asked_for_where_it_is_large(monkeypatch):
    """Corrections of a scalar loss read residuals off the trial's tape, beside that of the linearization."""
    def modes(scalar):
        net, closure, _ = poisson_2d.problem(poisson_2d.SMALL, 0)

        def loss():
            inside, edge = closure()
            return 0.5 * (inside.square().sum() + edge.square().sum())

        optimizer, seen = pgdfast.LM(net.parameters()), set()
        for _ in range(20):
            optimizer.step(loss if scalar else closure)
            seen.add(optimizer.report.mode)
        return seen

    assert PROBING in modes(True)
    monkeypatch.setattr("pgdfast.step.host.SPARED", 0)
    assert modes(True) == {PLAIN} and PROBING in modes(False)


@pytest.mark.parametrize("lr", [1.0, 0.1])
def test_a_step_is_held_to_the_promise_of_its_own_rate(lr):
    class Ratio:
        def correct(self, model, delta):
            loss = yield delta
            self.seen = model.ratio(loss)
            return delta, loss

    w, spy = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True), Ratio()
    optimizer = pgdfast.LM([w], lr=lr, damping_rule="gain-ratio", acceleration=spy)
    optimizer.step(lambda: 3 * w + 0.01 * w**2)
    assert spy.seen == pytest.approx(optimizer.report.gain_ratio, rel=1e-9) and spy.seen > 0.9
