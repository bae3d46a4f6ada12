"""The training loop, its clock, and what it hands back."""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

_GROWTH, _FINEST = 1.02, 2e-3
"""A run by seconds measures again when its time has grown by this factor, and by so many seconds."""


@dataclass(frozen=True)
class Case:
    """One training run to be made: an optimizer, a variant of the problem ("" where there is one), a seed.

    start: makes the `Session`, from the seed alone; called when the run begins. seconds: where given, the run ends with
    the first step past so much time in steps; `steps` is then a limit. together: whether it may be trained in one ensemble
    with the other such cases of its optimizer that take as many steps (`together`); its session then has a `Member`.
    """

    optimizer: str
    variant: str
    seed: int
    steps: int
    start: Callable
    seconds: float | None = None
    together: bool = False

    @property
    def key(self):
        """What tells the runs of a task apart."""
        return self.optimizer, self.variant, self.seed

    @property
    def work(self):
        """How long the run may be, in the unit that `train` counts to `advance`: seconds, or steps."""
        return self.steps if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Member:
    """What is trained, in a form that serves one network and, with others of its shape, an ensemble of them.

    Attributes:
        objective: function (network, *data) -> what LM's closure returns of one network.
        data: function of the step's number 1..T, returning the tensors `data`; equally many, of equal shapes, for every
            member. What else sets members apart (an output scale, say) is a buffer of their modules.
        build: function (params, **options) -> LM; `options` may have `ensemble`.

    """

    objective: Callable
    data: Callable
    build: Callable

    def alone(self, model):
        """Return (optimizer, closure) as a `Session` of this network alone has them."""
        return self.build(model.parameters()), lambda step: lambda: self.objective(model, *self.data(step))


@dataclass
class Session:
    """A model with its optimizer, ready to train.

    Attributes:
        model: the module whose state a checkpoint keeps.
        optimizer: a torch.optim.Optimizer.
        closure: function of the step's number 1..T, returning what `optimizer.step` takes. Minibatches depend on
            that number alone, so that a resumed run sees the same ones.
        measure: returns one row of numbers, in the order of `columns`.
        columns: their names.
        rows: increasing step numbers at which to measure, the first 0 and the last T; None in a run by seconds, which
            measures whenever its time has grown by 2 %.
        done: function of a row (a dict by column); True ends the run early.
        schedule: called before each step of a run by seconds with the share of them that has passed.
        outcome: returns tensors by name, of the trained model, that the `Run` keeps (for pictures).
        agreed: function of a step's seconds returning those that count, the same in all processes of a run.
        member: what an ensemble trains in place of `optimizer` and `closure`, where the case is `together`.

    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    closure: Callable
    measure: Callable
    columns: tuple[str, ...]
    rows: np.ndarray | None
    done: Callable = lambda row: False
    schedule: Callable = lambda share: None
    outcome: Callable = dict
    agreed: Callable = float
    member: Member | None = None


@dataclass(frozen=True)
class Run:
    """One optimizer, one variant, one seed, trained.

    Attributes:
        optimizer, variant, seed: those of the `Case`.
        at: step numbers of the rows, shape (R,).
        columns: measured quantities by name, each of shape (R,); NaN after the end of a run that ended early.
        step_seconds: wall time of each step, shape (T,); NaN where no step was taken. Of a member of an ensemble: that of
            the ensemble's step over the number of members that took it.
        last: number of the last step taken.
        stopped_at: the step after which the measured values were no longer finite, or None.
        outcome: tensors by name, of the trained model.

    """

    optimizer: str
    variant: str
    seed: int
    at: np.ndarray
    columns: dict[str, np.ndarray]
    step_seconds: np.ndarray
    last: int
    stopped_at: int | None = None
    outcome: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def key(self):
        """That of the run's `Case`."""
        return self.optimizer, self.variant, self.seed

    @property
    def step_ms(self):
        """Median wall time of a step, in milliseconds (NaN without a step)."""
        taken = self.step_seconds[np.isfinite(self.step_seconds)]
        return 1e3 * float(np.median(taken)) if taken.size else float("nan")

    @property
    def seconds(self):
        """Wall time spent in steps up to each row, shape (R,)."""
        total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(self.step_seconds))])
        return total[self.at]

    def first_step(self, column, reached):
        """Return the first measured step whose value in `column` satisfies `reached`, or None."""
        hits = np.flatnonzero(reached(self.columns[column]))
        return int(self.at[hits[0]]) if hits.size else None


def every(steps, interval, dense=0):
    """Return the step numbers 0, 1 .. `dense`, then every `interval`-th, and `steps`."""
    return np.unique(np.concatenate([np.arange(min(dense, steps) + 1), np.arange(0, steps, interval), [steps]]))


def geometric(steps, per_decade=40):
    """Return 0, `steps`, and step numbers between that lie evenly on a logarithmic axis."""
    count = int(per_decade * np.log10(max(steps, 10))) + 1
    return np.unique(np.concatenate([[0], np.geomspace(1, steps, count).round().astype(int)]))


def train(case, session, saved=None, advance=lambda count: None, keep=lambda state: None):
    """Train one case: take its steps and measure at its rows.

    The clock runs during `optimizer.step(closure)` alone: forward, backward or linear solve, and update; `measure()`
    is not timed. A run whose values stop being finite ends there.

    Args:
        case: what to run.
        session: what `case.start()` made.
        saved: state that an earlier, interrupted call handed to `keep`; training goes on from it.
        advance: called with the number of steps done, or of seconds spent in them (`Case.work`), for a progress bar;
            not with those of before `saved`.
        keep: called after each step with a function that returns the state to be saved.

    """
    timed = case.seconds is not None
    course = Course(case, session, saved)
    while course.running:
        if timed:
            session.schedule(course.elapsed / case.seconds)
        try:
            seconds = session.agreed(_timed_step(session.optimizer, session.closure(course.steps + 1)))
        except ValueError as error:
            # LM refuses to step from a loss that is not finite; between two rows this is where it shows.
            if "loss before the step is" not in str(error):
                raise
            course.refused()
            break
        advance(seconds if timed else 1)
        course.stepped(seconds)
        keep(lambda: course.state(session.optimizer.state_dict()))
    return course.run()


class Course:
    """A case under way: what was measured and how long its steps took, from the start or from a saved state.

    running: whether there are steps to take. steps: those taken. elapsed: seconds spent in them.
    """

    def __init__(self, case, session, saved=None):
        self.case, self.session = case, session
        self._at, self._table, self._seconds = [], [], []
        self.elapsed = self._mark = 0.0   # _mark: of a run by seconds, when to measure next
        self._stopped_at, self._over = None, False
        if saved is None:
            self._measure()
            return
        self._at, self._table, self._seconds = list(saved["at"]), saved["table"].tolist(), saved["seconds"].tolist()
        self.elapsed = self._mark = sum(self._seconds)
        session.model.load_state_dict(saved["model"])
        session.optimizer.load_state_dict(saved["optimizer"])
        self._judge()

    @property
    def steps(self):
        """The number of steps taken."""
        return len(self._seconds)

    @property
    def running(self):
        """Whether the run goes on."""
        return not (self._over or self.steps >= self.case.steps or self.elapsed >= (self.case.seconds or math.inf))

    def stepped(self, seconds):
        """Note a step that took so long, and measure where that is due."""
        self._seconds.append(seconds)
        self.elapsed += seconds
        timed = self.case.seconds is not None
        due = self.elapsed >= self._mark or not self.running if timed else self.steps == self.session.rows[len(self._at)]
        if due:
            self._measure()

    def refused(self):
        """Note that the next step could not be taken, since the loss is not finite."""
        self._stopped_at, self._over = self.steps, True

    def state(self, optimizer):
        """Return what a later call goes on from; `optimizer` is the state_dict of one that trains this case alone."""
        return {
            "key": list(self.case.key), "at": list(self._at), "table": torch.tensor(self._table, dtype=torch.float64),
            "seconds": torch.tensor(self._seconds, dtype=torch.float64),
            "model": self.session.model.state_dict(), "optimizer": optimizer,
        }

    def run(self):
        """Return the `Run`, with NaN for the rows and steps that were not reached."""
        at, table, seconds = np.asarray(self._at), list(self._table), list(self._seconds)
        if self.case.seconds is None:
            at = self.session.rows.copy()
            table += [[math.nan] * len(self.session.columns)] * (len(at) - len(table))
            seconds += [math.nan] * (self.case.steps - len(seconds))
        table = np.asarray(table, dtype=float)
        columns = {name: table[:, index].copy() for index, name in enumerate(self.session.columns)}
        return Run(*self.case.key, at, columns, np.asarray(seconds), self.steps, self._stopped_at, self.session.outcome())

    def _measure(self):
        with np.errstate(over="ignore", invalid="ignore"):   # what is not finite is looked for
            self._at.append(self.steps)
            self._table.append([float(value) for value in self.session.measure()])
        self._mark = max(_GROWTH * self.elapsed, self.elapsed + _FINEST)
        self._judge()

    def _judge(self):
        """See whether the run ends with its last row."""
        row = self._table[-1]
        if not np.isfinite(row).all():
            self._stopped_at = self._at[-1]
        done = self._stopped_at is not None or self.session.done(dict(zip(self.session.columns, row, strict=True)))
        self._over = bool(done)


def least_squares_closure(optimizer, residual, second_order):
    """Return the closure of a least-squares problem for `optimizer`.

    LM takes the residual tensor itself, hence L = 1/2 sum r^2. A first-order optimizer gets the
    gradient of 1/2 mean r^2, so that its learning rate does not depend on the number of points.
    """
    if second_order:
        return residual
    return backward_closure(optimizer, lambda: residual().square().mean() / 2)


def backward_closure(optimizer, loss):
    """Return the closure of a first-order optimizer that minimizes `loss()`."""

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


class Batches:
    """Minibatches without replacement that depend on seed and step number alone.

    Each pass over `total` samples takes a fresh permutation; a remainder smaller than `size` is left out of the pass.
    """

    def __init__(self, total, size, seed):
        self.total, self.size, self.seed = total, min(size, total), seed
        self._pass, self._order = None, None

    def __call__(self, step):
        """Return the sample indices of step 1, 2, ..., an int64 tensor."""
        per_pass = self.total // self.size
        number, place = divmod(step - 1, per_pass)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._pass, self._order = number, torch.randperm(self.total, generator=generator)
        return self._order[place * self.size:(place + 1) * self.size]


def adam_step_ms(model, residual, lr, steps=50, warm_up=5):
    """Return the median wall time, in milliseconds, of an Adam step on a copy of `model`.

    Args:
        model: the network; it is not changed.
        residual: function of a model, returning its residual tensor.
        lr: Adam's learning rate.
        steps: timed steps.
        warm_up: steps before them, not timed.

    """
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(twin.parameters(), lr=lr)
    closure = least_squares_closure(optimizer, lambda: residual(twin), second_order=False)
    seconds = [_timed_step(optimizer, closure) for _ in range(warm_up + steps)]
    return 1e3 * float(np.median(seconds[warm_up:]))


@contextlib.contextmanager
def torch_threads(count):
    """Run PyTorch with `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed_step(optimizer, closure):
    start = time.perf_counter()
    optimizer.step(closure)
    return time.perf_counter() - start
