"""The simulations of docs/compare.md: python docs/intervals.py, a minute.

Axes: S seeds, N sequences of a test, P resamplings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_compare import POPULATIONS, rate, tied

NAMES = {
    **{"seeds": "seeds", "own": "sequences of each seed"},
    **{"both": "both, and shared sequences", "shared": "shared sequences"},
}
DRAW = np.random.default_rng(1)


def bootstrap_tied(values_SN: np.ndarray) -> bool:
    """Whether 0 lies within the percentiles of means of seeds drawn again, and of each one's sequences."""
    S, N = values_SN.shape
    seed_PS1, sequence_PSN = DRAW.integers(0, S, (400, S, 1)), DRAW.integers(0, N, (400, S, N))
    low, high = np.quantile(values_SN[seed_PS1, sequence_PSN].mean((1, 2)), [0.025, 0.975])
    return bool(low <= 0 <= high)


print("| what varies | seeds | bootstrap: equal systems tied | t: equal systems tied | t: found |")
print(f"{'|---' * 5}|")
for name, (seed, shared, own) in POPULATIONS.items():
    for S in (3, 5):
        sizes, error = (seed, shared, own), (seed**2 / S + shared**2 / 100 + own**2 / (100 * S)) ** 0.5
        shares = rate(bootstrap_tied, S, sizes), rate(tied, S, sizes), 1 - rate(tied, S, sizes, 3 * error)
        cells = [NAMES[name] if S == 3 else "", str(S), *(f"{100 * share:.0f} %" for share in shares)]
        print(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
