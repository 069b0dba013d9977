"""How many bits a code costs simple models: what a transformer must beat by far."""

import numpy as np

SMOOTHING = (0.1, 1.0, 10.0, 100.0)  # pseudo-counts that are tried; the best one counts


def code_frequency_bits(train: np.ndarray, validation: np.ndarray, codebook_size: int) -> float:
    """Bits per code of a model that knows the codes' own frequencies.

    Args:
        train: `(M, N)` codes that the frequencies are taken from.
        validation: `(n, N)` codes that are predicted.
        codebook_size: K.

    Returns:
        The mean of -log2 p(code), with the pseudo-count that suits `validation` best.
    """
    counts = np.bincount(train.ravel(), minlength=codebook_size)
    return min(float(-np.log2(_smooth(counts, alpha)[validation]).mean()) for alpha in SMOOTHING)


def left_neighbour_bits(
    train: np.ndarray, validation: np.ndarray, codebook_size: int, columns: int
) -> float:
    """Bits per code of a model that sees the code to the left, and nothing at the first of a row.

    The distribution after a code is its counts in `train`, with pseudo-counts spread by the codes'
    own frequencies; arguments as for `code_frequency_bits`, and the columns of the grid.
    """
    train, validation = (
        codes.reshape(-1, columns).astype(np.int64) for codes in (train, validation)
    )
    own = _smooth(np.bincount(train.ravel(), minlength=codebook_size), 1.0)
    first = _smooth(np.bincount(train[:, 0], minlength=codebook_size), 1.0)

    pairs, counts = np.unique(
        train[:, :-1].ravel() * codebook_size + train[:, 1:].ravel(), return_counts=True
    )
    lefts = np.bincount(train[:, :-1].ravel(), minlength=codebook_size)
    left, right = validation[:, :-1].ravel(), validation[:, 1:].ravel()
    wanted = left * codebook_size + right
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    together = np.where(pairs[place] == wanted, counts[place], 0)
    after = min(
        -np.log2((together + alpha * own[right]) / (lefts[left] + alpha)).sum()
        for alpha in SMOOTHING
    )
    start = -np.log2(first[validation[:, 0]]).sum()
    return float((after + start) / validation.size)


def _smooth(counts: np.ndarray, alpha: float) -> np.ndarray:
    return (counts + alpha) / (counts.sum() + alpha * len(counts))
