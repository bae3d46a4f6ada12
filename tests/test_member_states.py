"""What an ensemble remembers of its members, taken apart and put together again."""

import copy

import pytest
import torch

import pgdfast

OPTIONS = {
    "delayed": {"damping": 0.3, "damping_rule": "delayed"},
    "scaled": {"damping": 0.3, "scaling": "marquardt"},
    "warm CG": {"damping": 0.3, "damping_rule": "constant", "solver": "cg", "cg": pgdfast.CG(20, 1e-4, warm_start=True)},
}


def _networks(seeds):
    def network(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(1, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()

    return [network(seed) for seed in seeds]


X = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]


def _closure(model):
    return lambda: model(X) - torch.sin(3 * X)


def _trained(seeds, options, steps, lr=0.5):
    networks = pgdfast.functional_ensemble(_networks(seeds))
    lm = pgdfast.LM(networks.parameters(), lr=lr, ensemble=len(seeds), **options)
    for _ in range(steps):
        lm.step(_closure(networks))
    return networks, lm


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_member_goes_on_alone_and_comes_back(options):
    networks, lm = _trained((0, 1, 2), options, 4)
    states, alone = copy.deepcopy(lm.member_state_dicts()), networks.member(1)
    own = pgdfast.LM(alone.parameters(), lr=0.5, **options)
    own.load_state_dict(states[1])
    for _ in range(3):
        expected = lm.step(_closure(networks))[1]
        found = own.step(_closure(alone))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        assert own.report.damping == pytest.approx(lm.report[1].damping, rel=1e-9)

    pair = pgdfast.functional_ensemble([alone, networks.member(0)])
    again = pgdfast.LM(pair.parameters(), lr=0.5, ensemble=2, **options)
    again.load_member_state_dicts([own.state_dict(), lm.member_state_dicts()[0]])
    expected, found = lm.step(_closure(networks)), again.step(_closure(pair))
    torch.testing.assert_close(found, expected[[1, 0]], rtol=1e-8, atol=0)
    torch.testing.assert_close(pair.member(0)(X), networks.member(1)(X), rtol=1e-7, atol=1e-9)


def test_learning_rates_of_their_own_are_kept():
    _, lm = _trained((0, 1), OPTIONS["delayed"], 1, lr=[0.5, 0.25])
    states = lm.member_state_dicts()
    assert [state["param_groups"][0]["lr"] for state in states] == [0.5, 0.25]
    lm.load_member_state_dicts(states[::-1])
    assert lm.param_groups[0]["lr"] == [0.25, 0.5]


def test_members_that_have_not_begun_join():
    networks, lm = _trained((0, 1), OPTIONS["delayed"], 0)
    lm.load_member_state_dicts(lm.member_state_dicts())
    assert lm.step(_closure(networks)).shape == (2,)


def test_what_does_not_fit_is_refused():
    _, lm = _trained((0, 1), OPTIONS["delayed"], 2)
    _, later = _trained((0, 1), OPTIONS["delayed"], 3)
    before = lm.member_state_dicts()
    with pytest.raises(ValueError, match=r"taken 2, 3 steps"):
        lm.load_member_state_dicts([before[0], later.member_state_dicts()[1]])
    with pytest.raises(ValueError, match=r"got 1 states.*2 members"):
        lm.load_member_state_dicts(before[:1])
    alone = pgdfast.LM(_networks((0,))[0].parameters())
    with pytest.raises(ValueError, match=r"one network"):
        alone.member_state_dicts()
    with pytest.raises(ValueError, match=r"one network"):
        alone.load_member_state_dicts(before)


def test_a_member_has_the_buffers_that_no_state_dict_has():
    class Scaled(torch.nn.Linear):
        def __init__(self, scale):
            super().__init__(1, 1)
            self.register_buffer("scale", torch.tensor(scale), persistent=False)

        def forward(self, x):
            return self.scale * super().forward(x)

    members = [Scaled(2.0), Scaled(3.0)]
    networks = pgdfast.functional_ensemble(members)
    x = torch.ones(1, 1)
    for b, member in enumerate(members):
        assert torch.equal(networks.member(b)(x), member(x)) and torch.allclose(networks(x)[b], member(x))
