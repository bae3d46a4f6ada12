"""Several cases trained as one ensemble: one `pgdfast.LM` steps all their networks, each as it would alone."""

import itertools
import time

import torch

import pgdfast
from pgdfast_experiments.training import Course

TIMING = (
    "step_ms and seconds of members of an ensemble: the wall time of the ensemble's step over the number of members that took "
    "it"
)


def train_together(cases, saved=None, advance=lambda count: None, keep=lambda states: None):
    """Train cases of one method as an ensemble until one of them ends, or more; return (runs, states).

    runs: those that ended. states: of the others, as `training.train` takes them, to go on with in a smaller ensemble.
    The clock runs during `optimizer.step(closure)` and the gathering of minibatches; every member's share is its part.

    Args:
        cases: two or more `Case`s that are `together`, of equal optimizer and steps.
        saved: their states, of equally many steps; None at the start.
        advance: called with a number of steps done, summed over the members.
        keep: called after each step with a function that returns the states to be saved, one per case that goes on.

    """
    courses = [Course(case, case.start(), state) for case, state in zip(cases, saved or itertools.repeat(None), strict=False)]
    runs = [course.run() for course in courses if not course.running]   # a first row may end a run
    courses = [course for course in courses if course.running]
    if runs or not courses:
        return runs, [course.state(course.session.optimizer.state_dict()) for course in courses]
    members = [course.session.member for course in courses]
    networks = pgdfast.functional_ensemble([course.session.model for course in courses])
    lm = members[0].build(networks.parameters(), ensemble=len(courses))
    lm.load_member_state_dicts([course.session.optimizer.state_dict() for course in courses])
    for b, course in enumerate(courses):
        _look_into(course.session.model, networks, b)
    batches = _Stacked([member.data for member in members])

    def states():
        return [_apart(course.state(state)) for course, state in zip(courses, lm.member_state_dicts(), strict=True)
                if course.running]

    while all(course.running for course in courses):
        start = time.perf_counter()
        data = batches(courses[0].steps + 1)
        losses = lm.step(lambda data=data: networks.map(members[0].objective, *data, each=True))
        taken = torch.isfinite(losses).tolist()
        share = (time.perf_counter() - start) / max(sum(taken), 1)
        for course, stepped in zip(courses, taken, strict=True):
            if stepped:
                course.stepped(share)
            else:
                course.refused()
        advance(sum(taken))
        keep(states)
    return [course.run() for course in courses if not course.running], states()


class _Stacked:
    """The members' data of a step, stacked; what has not changed since the last step is not stacked again."""

    def __init__(self, sources):
        self._sources, self._last, self._tensors = sources, None, ()

    def __call__(self, step):
        parts = [source(step) for source in self._sources]
        same = self._last is not None and all(
            a is b for one, other in zip(parts, self._last, strict=True) for a, b in zip(one, other, strict=True))
        if not same:
            self._last, self._tensors = parts, tuple(map(torch.stack, zip(*parts, strict=True)))
        return self._tensors


def _look_into(model, networks, b):
    """Make `model`, which measures, a view of member b."""
    stacked = networks.stacked()
    for name, parameter in model.named_parameters():
        parameter.data = stacked[name].detach()[b]


def _apart(state):
    """Copy what looks into the ensemble, which will have gone on when the state is used."""
    return state | {"model": {name: value.detach().clone() for name, value in state["model"].items()}}
