"""Fourier amplitudes and decay fits, on signals whose answer is known."""

import math

import numpy as np
import pytest

from pgdfast_experiments.measures import decay_per_100, fourier_amplitudes, median_of_resolved

STEPS = np.arange(401)


@pytest.mark.parametrize("points", [64, 99, 100])
@pytest.mark.parametrize("mode", [1, 4, 10])
def test_a_cosine_has_its_amplitude_in_its_mode_alone(points, mode):
    phase = 2 * np.pi * mode * np.arange(points) / points
    measured = fourier_amplitudes(-2.5 * np.cos(phase + 0.3), range(1, 11))
    expected = np.where(np.arange(1, 11) == mode, 2.5, 0)
    np.testing.assert_allclose(measured, expected, atol=1e-13)


@pytest.mark.parametrize("factor", [0.1, 0.366, 0.97, 1.0, 1.3])
def test_an_exponential_gives_its_factor(factor):
    assert decay_per_100(0.3 * factor ** (STEPS / 100)) == pytest.approx(factor, rel=1e-10)


def test_the_transient_is_left_out():
    curve = 0.5 ** (STEPS / 100)
    curve[:200] *= 1 + 50 * np.exp(-STEPS[:200] / 20)
    assert decay_per_100(curve) == pytest.approx(0.5, rel=1e-10)


def test_noise_on_the_curve_moves_the_fit_little():
    noise = np.random.default_rng(0).normal(scale=0.05, size=STEPS.size)
    assert decay_per_100(np.exp(noise) * 0.4 ** (STEPS / 100)) == pytest.approx(0.4, rel=0.03)


def test_the_fit_ends_where_the_curve_meets_the_floor():
    curve = np.maximum(1e-3 ** (STEPS / 100), 2e-14) * 1e-5  # meets 1e-13 at step 267
    assert decay_per_100(curve) == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("curve", [np.full(401, 1e-15), np.zeros(401), np.full(401, np.nan),
                                   np.ones(2)], ids=["rounding", "zero", "nan", "short"])
def test_a_curve_at_the_floor_is_unresolved(curve):
    assert math.isnan(decay_per_100(curve))


def test_a_mode_counts_when_most_seeds_resolve_it():
    nan = float("nan")
    assert median_of_resolved([0.2, nan, 0.4]) == pytest.approx(0.3)
    assert math.isnan(median_of_resolved([0.2, nan]))
    assert math.isnan(median_of_resolved([nan, nan, 0.1]))
