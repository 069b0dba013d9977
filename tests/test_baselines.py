"""Bits per code of the simple models against a direct computation, a code at a time."""

import math

import numpy as np
import pytest

from vqgan_jax.metrics.baselines import SMOOTHING, code_frequency_bits, left_neighbour_bits

K, ROWS, COLUMNS = 5, 3, 4


def some_codes(count, seed):
    """Codes that follow their left neighbour more often than not; code 4 is rare."""
    random = np.random.default_rng(seed)
    codes = random.choice(K, (count, ROWS, COLUMNS), p=[0.4, 0.3, 0.2, 0.08, 0.02])
    for column in range(1, COLUMNS):
        follows = random.random((count, ROWS)) < 0.6
        after = (codes[:, :, column - 1] + 1) % K
        codes[:, :, column] = np.where(follows, after, codes[:, :, column])
    return codes.reshape(count, -1).astype(np.int32)


def frequencies(values, pseudo_count):
    return [(values.count(k) + pseudo_count) / (len(values) + K * pseudo_count) for k in range(K)]


def test_code_frequencies():
    train, validation = some_codes(30, 0), some_codes(7, 1)
    seen = train.ravel().tolist()
    expected = min(
        np.mean([-math.log2(frequencies(seen, alpha)[code]) for code in validation.ravel()])
        for alpha in SMOOTHING
    )
    assert code_frequency_bits(train, validation, K) == pytest.approx(expected)
    constant = np.full((9, 12), 3)
    assert code_frequency_bits(constant, constant, K) < 0.02
    uniform = np.arange(4).repeat(3)[None]
    assert code_frequency_bits(uniform, uniform, 4) == pytest.approx(2.0)


@pytest.mark.parametrize("count", [1, 30])  # of one image, most pairs are new
def test_left_neighbours(count):
    train, validation = some_codes(count, 0), some_codes(7, 1)
    own = frequencies(train.ravel().tolist(), 1.0)
    firsts = frequencies(train.reshape(-1, COLUMNS)[:, 0].tolist(), 1.0)
    pairs = [
        (int(left), int(right))
        for row in train.reshape(-1, COLUMNS)
        for left, right in zip(row[:-1], row[1:], strict=True)
    ]
    lefts = [left for left, _ in pairs]

    def bits(alpha):
        total = 0.0
        for row in validation.reshape(-1, COLUMNS):
            total -= math.log2(firsts[row[0]])
            for left, right in zip(row[:-1], row[1:], strict=True):
                together = pairs.count((int(left), int(right)))
                alone = lefts.count(int(left))
                total -= math.log2((together + alpha * own[right]) / (alone + alpha))
        return total / validation.size

    expected = min(bits(alpha) for alpha in SMOOTHING)
    found = left_neighbour_bits(train, validation, K, COLUMNS)
    assert found == pytest.approx(expected)
    if count == 30:
        assert found < code_frequency_bits(train, validation, K) - 0.1


def test_the_largest_codebook_and_a_single_column():
    size = 2**18
    train = np.array([[size - 1, 0, size - 1, size - 2]] * 50)
    assert left_neighbour_bits(train, train, size, 4) < left_neighbour_bits(train, train, size, 1)
    assert code_frequency_bits(train, train, size) < 18.0
