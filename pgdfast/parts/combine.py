"""How the losses of parts of the rows combine to the loss on all rows.

A mean divides by the total count, sums add up, and what depends on the parameters alone counts once. Nothing depends on the
number of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_ADVICE = (
    "write the loss with .mean() or .sum(), which the tape shows as such, return residuals, or give parts of different numbers "
    "of rows, which tell"
)


class Combination:
    """The scale of every term of the loss in every part: the loss on all rows is sum_b sum_k scales[b][k] L_bk.

    Parts without rows have scales of 0.

    Args:
        shares: of every part one Share per term, with values (Tracer.shares), or None for a part without rows.
        name: of a part, for messages.
        settled: of each term the kind that was found out otherwise (probe.py), or None.

    Attributes: scales; kinds, of each term "sum", "mean" or "once", "" where one part alone has rows of it.
    Raises ValueError where the loss on all rows cannot be known from those on the parts.
    """

    def __init__(
        self, shares: Sequence, name: Callable[[int], str] = "part {}".format, settled: Sequence[str | None] = ()
    ):
        self._name = name
        known = [b for b, part in enumerate(shares) if any(_has_rows(s) for s in part or ())]
        known = known or [b for b, part in enumerate(shares) if part]   # a loss of the parameters alone
        self.scales: list[list[float]] = [[float(b in known)] * len(part or ()) for b, part in enumerate(shares)]
        self._entries = [sum(s.size for s in part or ()) for part in shares]
        for b in known[1:]:
            first, count = known[0], len(shares[b])
            if count != len(shares[first]):
                raise ValueError(
                    f"pgdfast.LM: the loss has {_terms(len(shares[first]))} in {name(first)} and {_terms(count)} in {name(b)}; "
                    "the closure must compute the same loss for every part of the rows."
                )
        kinds = []
        for k in range(len(shares[known[0]]) if known else 0):
            there = [b for b in known if shares[b][k].size]
            kind, scales = "", [1.0] * len(there)
            if len(there) > 1:
                kind, scales = self._term(k, there, [shares[b][k] for b in there], settled[k] if k < len(settled) else None)
            kinds.append(kind)
            for b, s in zip(there, scales, strict=True):
                self.scales[b][k] = s
        self.kinds = tuple(kinds)

    @property
    def uniform(self) -> list[float] | None:
        """Of each part the scale of its whole loss, or None where its terms have different ones."""
        if any(len(set(part)) > 1 for part in self.scales):
            return None
        return [part[0] if part else 0.0 for part in self.scales]

    def total(self, losses: Sequence[float], penalties: Sequence[float], penalty: float) -> float:
        """The loss on all rows where scales are uniform.

        losses: of the parts, with their quadratic penalties, whose values are `penalties`; penalty: that of all.
        """
        pairs = enumerate(zip(losses, penalties, strict=True))
        return penalty + sum(self.added(b, loss - own) for b, (loss, own) in pairs)

    def total_of_terms(self, values: Sequence[Sequence[float]], penalty: float) -> float:
        """The loss on all rows from the values of every part's terms."""
        return penalty + sum(self.added_by_terms(b, terms) for b, terms in enumerate(values))

    def added(self, b: int, loss: float) -> float:
        """What part b, all of whose terms have one scale, adds to the loss on all rows; loss: its own without penalties."""
        s = self.scales[b][0] if self.scales[b] else 0.0
        return s * loss if s else 0.0   # the loss of a part without rows may be NaN

    def added_by_terms(self, b: int, values: Sequence[float]) -> float:
        """The same by the values of its terms."""
        return sum(s * v for s, v in zip(self.scales[b], values, strict=True) if s)

    def _term(self, k: int, there: list[int], shares: list, settled: str | None) -> tuple[str, list[float]]:
        """The kind of a term, and its scales in the parts that have rows of it."""
        kinds = {s.kind for s in shares}
        what = f"term {k} of the loss" + (f", {shares[0].operation}," if shares[0].operation else "")
        if kinds == {"parameters"}:
            self._same_factor(what, there, shares)
            return "once", self._once(there)
        alike = same_values(shares)
        if settled == "once":
            if alike:
                return "once", self._once(there)
            values = [s.value or 0.0 for s in shares]
            raise ValueError(
                f"pgdfast.LM: {what} was the same in two parts of a batch, as a term is that does not belong to the rows and "
                f"counts once, and is between {min(values):.9g} and {max(values):.9g} in these parts; compute it from the "
                "part's rows, or from the same points in every part."
            )
        for s in shares:
            if s.kind == "whole":
                raise ValueError(
                    f"pgdfast.LM: {what} on all rows cannot be had from that on parts of them: {s.why}. Give all rows at once, "
                    "or write a term that is a sum or mean over rows."
                )
        if "parameters" in kinds:
            raise ValueError(f"pgdfast.LM: {what} is of the parameters alone in some parts and of data in others.")
        if alike and all(s.fixed for s in shares):
            return "once", self._once(there)
        if all(s.normalised for s in shares):
            raise ValueError(
                f"pgdfast.LM: the weights of {what} sum to one in every part, so that they may be normalised over the rows of "
                "the part, and would be others on all rows; divide by the sum of weights in the loss: "
                "(w * r**2).sum() / w.sum()."
            )
        if not _same([s.mark for s in shares]):
            raise ValueError(
                f"pgdfast.LM: {what} has weights, or a mask, after its sum or mean over rows, which are not the same in every "
                "part; weight rows before they are summed."
            )
        kind, counts = self._kind(what, there, shares, settled)
        if kind == "mean":
            total = sum(counts)
            return kind, [c / total for c in counts]
        if alike and settled != "sum":
            raise ValueError(
                f"pgdfast.LM: {what} is a sum of the same value, {shares[0].value:.6g}, in every part, so that it may be one "
                "term that does not belong to the parts and counts once; make it a mean, or compute it from the part's rows."
            )
        return kind, [1.0] * len(shares)

    def _once(self, there: list[int]) -> list[float]:
        """For what counts once: in the largest part."""
        largest = max(there, key=self._entries.__getitem__)
        return [float(b == largest) for b in there]

    def _kind(self, what: str, there: list[int], shares: list, settled: str | None) -> tuple[str, list[float]]:
        """("sum" or "mean", what each part's mean divides by)."""
        kinds, rows = {s.kind for s in shares}, [s.rows for s in shares]
        for b, s in zip(there, shares, strict=True):
            if s.kind == "unknown" and settled not in ("sum", "mean"):
                raise ValueError(f"pgdfast.LM: {what} cannot be combined with that of other parts ({self._name(b)}): {s.why}.")
        sizes = [float(s.size) for s in shares]
        if "unknown" in kinds:
            return settled, sizes
        counts, totals = [s.count for s in shares], [s.count / s.factor if s.factor else 0.0 for s in shares]
        sure = kinds - {"likely"} or {"mean"}
        if settled in ("sum", "mean") and kinds & {"likely", "divided"} and _same(rows):
            return settled, sizes
        factors = [s.factor for s in shares if not s.loose] or [1.0]
        if (sure == {"mean"} or kinds == {"sum"}) and _same(factors):
            (kind,) = sure
            if kind == "mean" and _same(rows) and not _same(sizes) and _same(counts):
                raise ValueError(
                    f"pgdfast.LM: {what} is a mean over the first dimension of its {rows[0]} x ... outputs, which is not that "
                    "of the rows: it is the same in all parts; let rows be the first dimension."
                )
            return kind, counts
        for measure in (rows, sizes):
            if not _same(measure):
                if _same(totals):
                    return "sum", counts
                if _same([t / n for t, n in zip(totals, measure, strict=True)]):
                    return "mean", [float(n) for n in measure]
        if kinds in ({"sum"}, {"mean"}):
            self._same_factor(what, there, shares)
        pairs = list(zip(there, shares, strict=True))
        if kinds == {"sum", "mean"}:
            one, other = (next(b for b, s in pairs if s.kind == kind) for kind in ("mean", "sum"))
            raise ValueError(
                f"pgdfast.LM: {what} is a mean over rows in {self._name(one)} and a sum in {self._name(other)}; the closure "
                "must compute the same loss for every part of the rows."
            )
        b, s = next((b, s) for b, s in pairs if s.kind not in ("sum", "mean") or s.kind != shares[0].kind)
        raise ValueError(
            f"pgdfast.LM: {what} is divided by {s.count:g} in {self._name(b)}, of {s.rows} rows, and whether that number "
            f"counts rows, or is a constant, cannot be told; {_ADVICE}."
        )

    def _same_factor(self, what: str, there: list[int], shares: list) -> None:
        first = shares[0]
        for b, s in zip(there, shares, strict=True):
            if not _same([first.factor, s.factor]):
                raise ValueError(
                    f"pgdfast.LM: {what} is multiplied by {first.factor:.6g} in {self._name(there[0])} and by {s.factor:.6g} "
                    f"in {self._name(b)}; what it would be on all rows cannot be told: use .mean() or .sum(), divide by "
                    "the sum of a mask or of weights with nothing added to it, or return residuals."
                )


def common_penalties(penalties: Sequence[dict | None], name: Callable[[int], str] = "part {}".format) -> dict[int, float]:
    """The quadratic penalties that all parts have, {parameter number: c}; None for a part that is not asked.

    Raises ValueError where they differ.
    """
    asked = [b for b, found in enumerate(penalties) if found is not None]
    for b in asked[1:]:
        first, other = penalties[asked[0]], penalties[b]
        for k in sorted(first.keys() | other.keys()):
            c, d = first.get(k, 0.0), other.get(k, 0.0)
            if not _same([c, d]):
                raise ValueError(
                    f"pgdfast.LM: the squares of parameter {k} are multiplied by {c / 2:.6g} in {name(asked[0])} and by "
                    f"{d / 2:.6g} in {name(b)}; a penalty counts once and must be the same for every part of the rows."
                )
    return dict(penalties[asked[0]]) if asked else {}


def same_values(shares: Sequence) -> bool:
    """Whether a term has one and the same value in all parts."""
    values = [s.value for s in shares]
    return None not in values and min(values) > 0 and max(values) - min(values) <= 1e-12 * max(values)


def _has_rows(share) -> bool:
    return share.size > 0 and share.kind != "parameters" and not share.fixed


def _terms(count: int) -> str:
    return f"{count} term" + "s" * (count != 1)


def _same(numbers: list) -> bool:
    return max(numbers) - min(numbers) <= 1e-6 * max(map(abs, numbers))
