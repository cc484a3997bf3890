"""Means and differences of errors, with intervals that hold at three seeds.

A bootstrap that resamples three seeds is far too narrow: by it two equal systems differ more than every fourth time.
Here an analysis of variance says how much of the spread is of seeds and how much of sequences that seeds share, and
Student's t how little three seeds know. Axes: S seeds, N sequences of a test.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ENOUGH = 3
"""Fewer seeds give no interval."""
LEVEL = 0.95
ANGLE = np.linspace(0, np.pi / 2, 10_001)


class Estimate(NamedTuple):
    """A mean over seeds, the ends of its 95 % interval, and how probable it is that the true mean lies below 0; the
    last three are None for fewer than three seeds."""

    mean: float
    low: float | None = None
    high: float | None = None
    below: float | None = None


def weighted(errors_SN: np.ndarray, weight_SN: np.ndarray) -> np.ndarray:
    """What sequences add to the errors of each seed (S,N): the mean over N is that over all predictions, of which each
    sequence has `weight`, and the spread is, to first order, that of this ratio."""
    share_SN = weight_SN / weight_SN.mean(1, keepdims=True)
    mean_S1 = (share_SN * errors_SN).mean(1, keepdims=True)
    return mean_S1 + share_SN * (errors_SN - mean_S1)


def estimate(values_SN: np.ndarray) -> Estimate:
    """The mean of values that vary by seed and by sequence, as of further seeds and sequences.

    Two-way random effects: the variance of the mean is (M_seeds + max(M_sequences − M_rest, 0)) / SN, of mean squares
    M. The second part is what sequences share across seeds; it is 0, but for chance, where each seed has sequences of
    its own, whose noise is then part of the spread of seeds. The degrees of freedom, S − 1 and more where sequences
    have the larger part, are those of Hillis (2007, Statistics in Medicine 26:596-619)."""
    S, N = values_SN.shape
    mean_S, mean = values_SN.mean(1), float(values_SN.mean())
    if S < ENOUGH:
        return Estimate(mean)
    seeds, shared = N * mean_S.var(ddof=1), 0.0
    if N > 1:
        mean_N = values_SN.mean(0)
        rest = ((values_SN - mean_S[:, None] - mean_N + mean) ** 2).sum() / ((S - 1) * (N - 1))
        shared = max(S * mean_N.var(ddof=1) - rest, 0.0)
    error = float(np.sqrt((seeds + shared) / (S * N)))
    if error == 0:
        return Estimate(mean, mean, mean, float(np.heaviside(-mean, 0.5)))
    df = min((S - 1) * (1 + shared / max(seeds, 1e-300)) ** 2, 1e4)
    density = np.cos(ANGLE) ** (df - 1)  # of Student's t, by the angle whose tangent is t / √df
    inside = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    inside /= inside[-1]
    reach = error * np.sqrt(df) * np.tan(np.interp(LEVEL, inside, ANGLE))
    beyond = np.interp(np.arctan(abs(mean) / error / np.sqrt(df)), ANGLE, inside) / 2
    return Estimate(mean, float(mean - reach), float(mean + reach), float(0.5 - np.copysign(beyond, mean)))
