"""What is read off the curves: Fourier amplitudes, rates of decay, and the verdict of a check."""

from dataclasses import dataclass

import numpy as np

FLOOR = 1e-13
"""Amplitudes below this are rounding (float64, signals of size one); fits leave them out."""

PASS, FAIL, OPEN = "pass", "not reproduced", "not judged"


def fourier_amplitudes(signal, modes):
    """Return the amplitudes 2 |rfft_k| / N of `signal` for k in `modes`.

    So scaled, a cos(2 pi k j / N + phase) sampled at j = 0..N-1 has amplitude |a| in mode k, for
    0 < k < N/2.

    Args:
        signal: real samples over one period, shape (N,).
        modes: increasing whole numbers k, shape (K,).

    Returns:
        Amplitudes, shape (K,), in the unit of the signal.

    """
    spectrum = np.fft.rfft(signal)
    return 2 / len(signal) * np.abs(spectrum[np.asarray(modes)])


def decay_per_100(amplitude, floor=FLOOR):
    """Return the factor by which a curve falls per 100 steps, fitted over the second half.

    Least squares on ln(amplitude) against the step; the second half leaves the transient out. The
    fit ends where the curve first meets the rounding floor.

    Args:
        amplitude: one value per step, shape (T + 1,).
        floor: smallest amplitude that is not rounding.

    Returns:
        exp(100 * slope), or NaN (unresolved) with fewer than three points above the floor.

    """
    start = len(amplitude) // 2
    window = amplitude[start:]
    above = window > floor  # False for NaN too
    length = len(window) if above.all() else int(np.argmin(above))
    if length < 3:
        return float("nan")
    slope = np.polyfit(np.arange(length), np.log(window[:length]), 1)[0]
    return float(np.exp(100 * slope))


def median_of_resolved(values):
    """Return the median of the values that are not NaN, or NaN when most are NaN."""
    values = np.asarray(values, dtype=float)
    resolved = values[~np.isnan(values)]
    return float(np.median(resolved)) if 2 * resolved.size > values.size else float("nan")


@dataclass(frozen=True)
class Check:
    """A claim about the curves, what was measured, and whether it held: PASS, FAIL or OPEN."""

    claim: str
    measured: str
    outcome: str
