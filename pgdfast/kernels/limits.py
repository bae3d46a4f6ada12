"""The thresholds of csrc/plan/limits.h, where each stands with its reason, as Python's constants."""

from __future__ import annotations

import re
from pathlib import Path

from .native import _C

_HEADER = Path(__file__).resolve().parents[2] / "csrc/plan/limits.h"
_LINE = re.compile(r"^constexpr (?:int|index|double) k(\w+) = ([\w.+-]+?)(?: << (\d+))?;", re.MULTILINE)


def read_header(text: str) -> dict[str, int | float]:
    """{name: value} of the header's lines, for a source folder without a built core."""
    found = {}
    for name, number, shift in _LINE.findall(text):
        value = float(number) if "." in number or "e" in number else int(number)
        found[f"k{name}"] = value << int(shift) if shift else value
    return found


def _table() -> dict[str, int | float]:
    return read_header(_HEADER.read_text(encoding="utf-8")) if _C is None else _C.limits()


_known = _table()

DOUBLE_FACTOR: int = _known["kDoubleFactor"]
ONE_THREAD_ORDER: int = _known["kOneThreadOrder"]
WIDE_FACTOR: int = _known["kWideFactor"]
NARROW_CONDITION: float = _known["kNarrowCondition"]
NARROW_TOLERANCE: float = _known["kNarrowTolerance"]
REFINE_ROUNDS: int = _known["kRefineRounds"]
REFINED_ERROR: float = _known["kRefinedError"]
REFINE_FIRST: float = _known["kRefineFirst"]
REFINE_RATE: float = _known["kRefineRate"]

CHECK_EVERY: int = _known["kCheckEvery"]
FALL: float = _known["kFall"]
RESTART_RATIO: float = _known["kRestartRatio"]
CLAIM_RATIO: float = _known["kClaimRatio"]
PROGRESS_LEAST: int = _known["kProgressLeast"]
PROGRESS_PART: int = _known["kProgressPart"]
PATH_SLOTS: int = _known["kPathSlots"]
CLAIMS: int = _known["kClaims"]

SHIFT_PANEL: int = _known["kShiftPanel"]
SHIFT_PROBES: int = _known["kShiftProbes"]
SHIFT_EARLY: float = _known["kShiftEarly"]
SHIFT_DRIFT: float = _known["kShiftDrift"]

PASS_BYTES: int = _known["kPassBytes"]
PASS_PART: int = _known["kPassPart"]
ROWS_BYTES: int = _known["kRowsBytes"]
ONE_ARENA_BYTES: int = _known["kOneArenaBytes"]

OUTCOME_NUMBERS: int = _known["kOutcomeNumbers"]
