"""Line searches, without an optimizer around them."""

import math

import pytest

from pgdfast import Armijo
from pgdfast.step import chosen_search


def ended(search, evaluate, loss, slope):
    """(length that a search settles on, lengths that it asked for)."""
    proposal, seen, answer = search.search(loss, slope), [], None
    while True:
        try:
            seen.append(proposal.send(answer))
        except StopIteration as end:
            return end.value, seen
        answer = evaluate(seen[-1])


def test_armijo_takes_the_first_step_that_descends_enough():
    def evaluate(t):
        return {1.0: math.nan, 0.5: 5.0, 0.25: 1.0 - 1e-5 * 0.25}.get(t, 1.0 - 2e-4 * t)

    assert ended(Armijo(), evaluate, 1.0, 1.0) == (0.125, [1.0, 0.5, 0.25, 0.125])
    assert ended(Armijo(trials=2), evaluate, 1.0, 1.0) == (None, [1.0, 0.5])
    assert ended(Armijo(), lambda t: math.inf, 1.0, 1.0) == (None, [0.5**k for k in range(10)])
    assert ended(Armijo(c=0.5, factor=0.1), lambda t: 1.0 - 0.4 * t if t > 0.05 else 0.0, 1.0, 1.0)[1] == [1.0, 0.1, 0.1 * 0.1]


def test_choice_of_a_search():
    assert chosen_search("armijo") == Armijo() and chosen_search(None) is None
    own = Armijo(trials=3)
    assert chosen_search(own) is own
    with pytest.raises(ValueError, match="unknown line_search 'wolfe'; use None, 'armijo', or an object"):
        chosen_search("wolfe")
    with pytest.raises(TypeError, match=r"has no search\(loss, slope\) method; see pgdfast.LineSearch"):
        chosen_search(3)
