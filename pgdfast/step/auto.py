"""The damping rule that finds out whether second-order corrections pay.

Where steps are short because the residuals bend, a corrected step goes further at a smaller mu; its worth is less in the step
itself than in the mu that it allows, so steps are judged in blocks. Elsewhere corrections cost runs of the closure for nothing.
"""

from __future__ import annotations

import math

from .cost import StepCost
from .rules import LARGEST, SMALLEST, DampingRule, GainRatio, Memory, bounded, raised

PLAIN, PROBING, CORRECTED = 0.0, 1.0, 2.0
MODES = ("plain", "probing", "corrected")

_PUSH = 3.0       # a probe begins at mu over this
_BLOCK = 4        # steps of a probe
_FIRST = 3        # plain steps before a probe
_GIVE_UP = 0.3    # a probe ends early where it gains less than this part of what plain steps gain
_LIMITED = 0.9    # a gain ratio above it says that curvature is not what limits mu
_REGRET = 0.1     # of all operations, what probes in vain may have cost for another to begin
_LOSES = 0.2      # and, with the one under way, for it to go on
_EXTRA = 3.0      # rounds of correction that a probe is expected to cost in vain
_USEFUL = 0.2     # corrections go on while at least this part of the late ones ended in a step
_KEEPS = 0.7      # of averages, from step to step

_ENOUGH, _EXACT = 0.25, 0.9       # gain ratios of a corrected step after which mu falls, and after which it may fall faster
_SLOWEST, _FASTEST = 3.0, 6.0     # by how much mu falls
_FASTER, _SLOWER = 1.25, 2.0      # by how much that grows and shrinks
_LINEAR, _EAGER = 0.03, 4.0       # two plain steps in a row whose gain ratio is so near 1 lower mu so much further
_SAME = 1e-6      # of ln(loss) between a step's end and the next one's start: the batch is the same
_CHEAP = 0.2      # a round that costs less than this part of a plain step: then more of them are no loss


class _Corrected(DampingRule):
    """mu falls by 3 where a step kept a quarter of what it promised, else it stays; 2 mu after a rejection.

    Where rounds are cheap beside a step, the fall grows to 6 while steps keep nearly all that they promise.
    """

    def __init__(self, smallest: float):
        self.smallest = smallest

    def accepted(self, mu, memory, rho):
        if not rho > _ENOUGH or mu == 0:
            return mu, {}
        speed = memory["speed"]
        if rho > _EXACT and memory["rounds"] < _CHEAP:
            speed = min(speed * _FASTER, _FASTEST)
        return bounded(mu / speed, self.smallest, LARGEST), {"speed": speed}

    def rejected(self, mu, memory, rho, curvature):
        return raised(mu, 2.0, curvature), {"speed": max(memory["speed"] / _SLOWER, _SLOWEST)}


class Auto(DampingRule):
    """Nielsen's gain-ratio rule; and, where that pays, corrected steps whose mu falls faster.

    After some plain steps whose gain ratio shows that curvature limits mu, four corrected steps from mu / 3 are a probe. They
    are gone on with if ln(loss) fell by more per operation than over the plain steps before; otherwise mu returns, halfway in
    its logarithm where the probe gained. Operations are predicted from sizes (cost.py), so runs repeat on every machine. What
    probes in vain have cost beyond the plain steps that would have gained as much is bounded: none begins above a tenth of
    all, and none goes on above a fifth; nor does one begin where changes of the batch hide the progress. Corrected steps end
    when few corrections lead to a step, or when late ones gain less than the plain steps before them did.

    mu of corrected steps falls by 3, by up to 6 where rounds of correction cost little beside a step, and doubles in vain;
    plain ones are GainRatio's, but for a fall by a further 4 where the model predicts the loss of an unchanged batch to 3 %
    twice in a row. Where there is nothing to correct with (ensembles, losses that are no sums of squares), all steps are
    GainRatio's.

    smallest: as for GainRatio.
    """

    learns = True

    def __init__(self, smallest: float = SMALLEST):
        self.plain, self.smallest = GainRatio(smallest), smallest
        self._corrected = _Corrected(smallest)

    def memory(self) -> Memory:
        """GainRatio's, and: mode, numbers of the last step, averages of plain and corrected ones, a probe's sums."""
        return self.plain.memory() | {
            "mode": PLAIN, "loss": math.nan, "after": math.nan, "ratio": math.nan, "cost": 0.0, "total": 0.0, "regret": 0.0,
            "round": math.inf, "rounds": 1.0, "fall": 0.0, "spent": 0.0, "drift": 0.0, "wait": float(_FIRST),
            "probe_steps": 0.0, "probe_fall": 0.0, "probe_spent": 0.0, "return": 0.0, "useful": 1.0, "speed": _SLOWEST,
        }

    @property
    def captured(self) -> DampingRule:
        """GainRatio: its steps are plain."""
        return self.plain

    def interrupted(self, memory):
        """Nothing is known of the last steps, and mu has moved: a probe is over, and averages begin anew."""
        mode = CORRECTED if memory["mode"] == CORRECTED else PLAIN
        return memory | {"mode": mode, "cost": 0.0, "ratio": math.nan, "fall": 0.0, "spent": 0.0, "wait": float(_FIRST)}

    # --- before and after a step ------------------------------------------------------------------------------------------

    def begins(self, mu, memory, loss, correctable: bool = True):
        """(mu, memory) for a step from here, where the loss is this: what the last step gained is known now.

        correctable: is there anything to correct this step with?
        """
        if not correctable:
            known = memory["mode"] != PLAIN or memory["cost"] > 0
            return mu, self.interrupted(memory) | {"mode": PLAIN} if known else memory
        m = dict(memory)
        if not m["cost"] > 0:
            return mu, m
        fall = _log_ratio(m["loss"], loss)
        m["total"] += m["cost"]
        m["drift"] = _KEEPS * m["drift"] + (1 - _KEEPS) * abs(_log_ratio(m["after"], loss))   # 0 but for other batches
        if m["mode"] == PROBING:
            mu = self._probed(mu, m, fall)
        elif m["mode"] == PLAIN:
            m["fall"], m["spent"], m["wait"] = _KEEPS * m["fall"] + fall, _KEEPS * m["spent"] + m["cost"], m["wait"] - 1
            if self._may_probe(m):
                m.update({
                    "mode": PROBING, "return": mu, "probe_steps": 0.0, "probe_fall": 0.0, "probe_spent": 0.0, "speed": _SLOWEST,
                })
                mu = max(mu / _PUSH, min(mu, self.smallest))
        else:
            m["probe_fall"] = _KEEPS * m["probe_fall"] + fall
            m["probe_spent"] = _KEEPS * m["probe_spent"] + m["cost"]
            if m["useful"] < _USEFUL or m["probe_fall"] * m["spent"] < max(m["fall"], 0.0) * m["probe_spent"]:
                m.update(mode=PLAIN, wait=float(_FIRST), fall=0.0, spent=0.0)
        return mu, m

    def ended(self, memory, report, cost: StepCost, comparable: bool = True):
        """The memory after a step. cost: of its parts; comparable: whether the next loss is the same function."""
        kept, useful = report.status == "accepted", memory["useful"]
        if report.trials > report.attempts or not kept:
            useful = _KEEPS * useful + (1 - _KEEPS) * (kept and (report.correction or 0.0) > 0)
        return memory | {
            "loss": report.loss, "after": report.loss_after if kept else report.loss, "useful": useful,
            "ratio": math.nan if report.gain_ratio is None else report.gain_ratio,
            "cost": cost.of(report.attempts, report.trials) if comparable else 0.0,
            "round": cost.round, "rounds": cost.round / cost.of(1, 1),
        }

    @staticmethod
    def mode(memory) -> str:
        """Of a step: one of MODES."""
        return MODES[int(memory["mode"])]

    def corrects(self, memory) -> bool:
        """Whether the step is to be corrected."""
        return memory["mode"] != PLAIN

    @staticmethod
    def _may_probe(m: Memory) -> bool:
        limited = m["wait"] <= 0 and m["ratio"] < _LIMITED and m["spent"] > 0
        limited = limited and m["fall"] >= m["drift"]   # where changes of the batch hide progress, there is nothing to compare
        return limited and m["regret"] + _EXTRA * m["round"] < _REGRET * m["total"]

    def _probed(self, mu, m: Memory, fall: float):
        """Mu after a step of a probe, which may end with it."""
        m["probe_steps"] += 1
        m["probe_fall"] += fall
        m["probe_spent"] += m["cost"]
        needed = m["probe_fall"] * m["spent"]   # with m["fall"], what plain steps would have needed for the same
        gained = m["fall"] * m["probe_spent"]
        lost = max(m["probe_spent"] - max(needed, 0.0) / m["fall"], 0.0) if m["fall"] > 0 else 0.0
        over = m["probe_steps"] >= _BLOCK or m["regret"] + lost > _LOSES * m["total"]
        poor = needed < _GIVE_UP * gained or m["probe_fall"] <= 0
        if over and needed > gained and m["probe_fall"] > 2 * m["drift"]:
            m.update(mode=CORRECTED, useful=1.0)
        elif over or poor:
            m.update(mode=PLAIN, wait=float(_FIRST), nu=2.0, regret=m["regret"] + lost)
            # A probe that gained has learned that a smaller mu does, if not how small a one for plain steps.
            mu = max(mu, m["return"] if poor else math.sqrt(mu * m["return"]))
        return mu

    # --- after an attempt -------------------------------------------------------------------------------------------------

    def _rule(self, memory) -> DampingRule:
        return self.plain if memory["mode"] == PLAIN else self._corrected

    def accepted(self, mu, memory, rho):
        """As the mode's rule has it."""
        mu, own = self._rule(memory).accepted(mu, memory, rho)
        holds = abs(rho - 1) < _LINEAR > abs(memory["ratio"] - 1)
        if memory["mode"] == PLAIN and holds and memory["drift"] < _SAME:
            mu = max(mu / _EAGER, min(mu, self.smallest))   # mu alone is in the way
        return mu, memory | own

    def rejected(self, mu, memory, rho, curvature):
        """As the mode's rule has it."""
        mu, own = self._rule(memory).rejected(mu, memory, rho, curvature)
        return mu, memory | own

    def exhausted(self, mu, memory):
        """As GainRatio has it."""
        mu, own = self.plain.exhausted(mu, memory)
        return mu, memory | own


def _log_ratio(before: float, after: float) -> float:
    """ln(before / after), 0 where there is none."""
    return math.log(before / after) if before > 0 and after > 0 and before / after > 0 else 0.0
