"""How the losses of parts of the rows combine to the loss on all rows.

A mean divides by the total count, sums add up, and what depends on the parameters alone counts once. Nothing depends on the
number of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_ADVICE = (
    "write the loss with .mean() or .sum(), which the tape shows as such, return residuals, or give parts of different numbers "
    "of rows"
)


class Combination:
    """The scale of every term of the loss in every part: the loss on all rows is sum_b sum_k scales[b][k] L_bk.

    shares: of every part one Share per term, or None for a part without rows, whose terms are not known; name: of a part, for
    messages. settled: of each term the kind that was found out otherwise, or None.
    Raises ValueError where the loss on all rows cannot be known from those on the parts.
    """

    def __init__(
        self, shares: Sequence, name: Callable[[int], str] = "part {}".format, settled: Sequence[str | None] = ()
    ):
        self._name = name
        self.scales: list[list[float]] = [[1.0] * len(part or ()) for part in shares]
        known = [b for b, part in enumerate(shares) if part is not None]
        for b in known[1:]:
            first, count = known[0], len(shares[b])
            if count != len(shares[first]):
                raise ValueError(
                    f"pgdfast.LM: the loss has {_terms(len(shares[first]))} in {name(first)} and {_terms(count)} in {name(b)}; "
                    "the closure must compute the same loss for every part of the rows."
                )
        for k in range(len(shares[known[0]]) if known else 0):
            there = [b for b in known if shares[b][k].size]
            if len(there) > 1:
                kind = settled[k] if k < len(settled) else None
                scales = self._term(k, there, [shares[b][k] for b in there], kind)
                for b, s in zip(there, scales, strict=True):
                    self.scales[b][k] = s

    @property
    def uniform(self) -> list[float] | None:
        """Of each part the scale of its whole loss, or None where its terms have different ones."""
        if any(len(set(part)) > 1 for part in self.scales):
            return None
        return [part[0] if part else 1.0 for part in self.scales]

    def total(self, losses: Sequence[float], penalties: Sequence[float], penalty: float) -> float:
        """The loss on all rows where scales are uniform.

        losses: of the parts, with their quadratic penalties, whose values are `penalties`; penalty: that of all.
        """
        terms = zip(self.uniform, losses, penalties, strict=True)
        return penalty + sum(s * (loss - own) for s, loss, own in terms if s)

    def total_of_terms(self, values: Sequence[Sequence[float]], penalty: float) -> float:
        """The loss on all rows from the values of every part's terms."""
        pairs = zip(self.scales, values, strict=True)
        return penalty + sum(s * v for part, terms in pairs for s, v in zip(part, terms, strict=True) if s)

    def _term(self, k: int, there: list[int], shares: list, settled: str | None) -> list[float]:
        """The scales of one term in the parts that have rows of it."""
        kinds = {s.kind for s in shares}
        what = f"term {k} of the loss" + (f" ({shares[0].operation})" if shares[0].operation else "")
        if kinds == {"parameters"}:
            self._same_factor(k, what, there, shares)
            return [1.0] + [0.0] * (len(shares) - 1)
        for b, s in zip(there, shares, strict=True):
            if s.kind == "whole":
                raise ValueError(
                    f"pgdfast.LM: {what} is no sum over rows: {s.why}; from parts of the rows its value on all of them cannot "
                    f"be had. Leave it out, or give all rows at once ({self._name(b)})."
                )
        if "parameters" in kinds:
            raise ValueError(f"pgdfast.LM: {what} is of the parameters alone in some parts and of data in others.")
        values = [s.value for s in shares]
        alike = None not in values and min(values) > 0 and max(values) - min(values) <= 1e-12 * max(values)
        if alike and all(s.fixed for s in shares):
            return [1.0] + [0.0] * (len(shares) - 1)
        if all(s.normalised for s in shares):
            raise ValueError(
                f"pgdfast.LM: the weights of {what} sum to one in every part, so that they may be normalised over the rows of "
                "the part, and would be others on all rows; divide by the sum of weights in the loss: "
                "(w * r**2).sum() / w.sum()."
            )
        kind, counts = self._kind(what, there, shares, settled)
        if kind == "mean":
            total = sum(counts)
            return [c / total for c in counts]
        if alike:
            raise ValueError(
                f"pgdfast.LM: {what} is a sum of the same value, {values[0]:.6g}, in every part, so that it may be one term that "
                "does not belong to the parts and counts once; make it a mean, or compute it from the part's rows."
            )
        return [1.0] * len(shares)

    def _kind(self, what: str, there: list[int], shares: list, settled: str | None) -> tuple[str, list[float]]:
        """("sum" or "mean", what each part's mean divides by)."""
        known = [(b, s) for b, s in zip(there, shares, strict=True) if s.kind != "unknown"]
        doubtful = [(b, s) for b, s in zip(there, shares, strict=True) if s.kind == "unknown"]
        if doubtful:
            b, s = doubtful[0]
            raise ValueError(
                f"pgdfast.LM: {what} cannot be combined with that of other parts, as {s.why} ({self._name(b)}); {_ADVICE}."
            )
        kinds, rows = {s.kind for _, s in known}, [s.rows for _, s in known]
        counts, totals = [s.count for _, s in known], [s.count / s.factor if s.factor else 0.0 for _, s in known]
        sizes = [s.size for _, s in known]
        if kinds in ({"sum"}, {"mean"}) and _same([s.factor for _, s in known]):
            (kind,) = kinds
            if kind == "mean" and _same(rows) and not _same(sizes) and _same(counts):
                raise ValueError(
                    f"pgdfast.LM: {what} is a mean over the first dimension of its {rows[0]} x ... outputs, which is not that "
                    "of the rows: it is the same in all parts; let rows be the first dimension."
                )
            return kind, counts
        if not _same(rows):
            if _same(totals):
                return "sum", counts
            if _same([t / n for t, n in zip(totals, rows, strict=True)]):
                return "mean", [float(n) for n in rows]
        if settled and _same(totals):
            return settled, [float(n) for n in rows]
        if kinds in ({"sum"}, {"mean"}):
            self._same_factor(0, what, [b for b, _ in known], [s for _, s in known])
        b, s = next((b, s) for b, s in known if s.kind == "divided" or s.kind != known[0][1].kind)
        raise ValueError(
            f"pgdfast.LM: {what} is divided by {s.count:g} in {self._name(b)}, of {s.rows} rows, and whether that number counts "
            f"rows, or is a constant, cannot be told; {_ADVICE}."
        )

    def _same_factor(self, k: int, what: str, there: list[int], shares: list) -> None:
        first = shares[0]
        for b, s in zip(there, shares, strict=True):
            if not _same([first.factor, s.factor]):
                raise ValueError(
                    f"pgdfast.LM: {what} is multiplied by {first.factor:.6g} in {self._name(there[0])} and by {s.factor:.6g} in "
                    f"{self._name(b)}; what it would be on all rows cannot be told: use .mean() or .sum(), or return residuals."
                )


def _terms(count: int) -> str:
    return f"{count} term" + "s" * (count != 1)


def _same(numbers: list) -> bool:
    return max(numbers) - min(numbers) <= 1e-6 * max(map(abs, numbers))
