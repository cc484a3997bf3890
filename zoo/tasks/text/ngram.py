"""A byte trigram, the baseline of text: what counting predicts from the two bytes before."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BYTES = 256
ORDERS = 3


class Trigram:
    """Interpolated Witten–Bell counts (Witten & Bell 1991) of bytes given the 0, 1 and 2 bytes before them.

    p(c|h) = (n(h,c) + d(h) p(c|h')) / (n(h) + d(h)) with d(h) different bytes seen after h, and h' the last byte of h;
    below the empty history, p is uniform; a history never seen counts for nothing.
    """

    def __init__(self, texts: Iterable[np.ndarray]):
        """texts: token ids; those above 255 are no bytes and break the history."""
        tables = [np.zeros(BYTES ** (order + 1), np.int64) for order in range(ORDERS)]
        for ids in texts:
            byte, code, whole = ids < BYTES, np.zeros(len(ids) + 1, np.int32), np.ones(len(ids) + 1, bool)
            for order, table in enumerate(tables):  # code: the bytes up to each place as one number
                code, whole = code[:-1] * BYTES + ids[order:], whole[:-1] & byte[order:]
                table += np.bincount(code[whole], minlength=len(table))
        self.counts = [table.reshape(-1, BYTES) for table in tables]

    def bits(self, ids: np.ndarray) -> np.ndarray:
        """−log₂ p of each of `ids` (T) given those before it, a meaningless number where it is no byte."""
        p, history, whole = np.full(len(ids), 1 / BYTES), np.zeros(len(ids), np.int64), np.ones(len(ids), bool)
        for order, counts in enumerate(self.counts):
            if order:
                earlier = np.pad(ids.astype(np.int64), (order, 0), constant_values=BYTES)[: len(ids)]
                history += earlier * BYTES ** (order - 1)
                whole &= earlier < BYTES
            rows = np.where(whole, history, 0)
            total, distinct = counts[rows].sum(-1), (counts[rows] > 0).sum(-1)
            blend = (counts[rows, ids.clip(max=BYTES - 1)] + distinct * p) / np.maximum(total + distinct, 1)
            p = np.where(whole & (total > 0), blend, p)
        return -np.log2(p)
