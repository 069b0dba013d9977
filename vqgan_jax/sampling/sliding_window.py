"""Grids of codes larger than the transformer's, drawn through a window that slides over them.

"Taming Transformers", section 3.2 ("Generating High-Resolution Images"): each code is predicted
from a window of the size that the transformer was trained on, with the code in its middle or, near
the edges, as close to it as the window can be without leaving the grid. The window of code (i, j)
in a grid of H x W begins at

    top  = clip(i - a, 0, H - h)
    left = clip(j - b, 0, W - w)

for windows of h x w codes with the middle (a, b). Of an even number of codes there are two in the
middle: the reference takes the later one, (h // 2, w // 2), for images with an image in front, and
the earlier one, ((h - 1) // 2, (w - 1) // 2), for scenes with a layout in front. What in the window
is not drawn yet comes after (i, j) in the order of rows, and the causal mask hides it.

Code (i, j) is drawn at step lag * i + j. A lag of W is the reference's order, row by row. The
smallest lag is w, and then the rows in flight are a wavefront: ceil(W / w) codes are drawn as one
batch, and W + w (H - 1) steps do instead of W H. The codes are the same for each lag >= w, up to
rounding, because all that (i, j) is predicted from is drawn in earlier steps: in its own row, what
is left of it; and codes (i', j') in rows i' <= i - 1 and columns j' <= left + w - 1. No window
begins right of its code, left <= j, whatever its middle 0 <= b < w, hence

    lag i' + j' <= lag (i - 1) + j + w - 1 < lag i + j.

A lag of w - 1 is too little at j = 0, where every window begins at column 0: code (i - 1, w - 1)
would be drawn in the step of (i, 0).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.transformer import Transformer, cast_kernels
from vqgan_jax.sampling.filters import Filters, draw
from vqgan_jax.sampling.guidance import guide


def num_steps(height: int, width: int, lag: int) -> int:
    """Steps that draw a grid of codes.

    Args:
        height: rows of the grid.
        width: its columns.
        lag: columns that a row is behind the one above it: those of the window for the wavefront,
            those of the grid for row by row.
    """
    return width + lag * (height - 1)


def steps_of_codes(height: int, width: int, lag: int) -> np.ndarray:
    """In which step each code of a grid is drawn, `(height, width)`; `num_steps` is one more."""
    rows, columns = np.indices((height, width))
    return lag * rows + columns


def sample_steps(
    transformer: Transformer,
    params,
    conditions: Sequence[jax.Array],
    key: jax.Array,
    indices: jax.Array,
    filters: Filters,
    codes: jax.Array,
    known_mask: jax.Array,
    first: int | jax.Array,
    count: int | jax.Array,
    null_conditions: Sequence[jax.Array] | None = None,
    scales: jax.Array | None = None,
    lag: int | None = None,
    middle: tuple[int, int] | None = None,
) -> jax.Array:
    """Some steps of drawing a grid, in one compiled loop; all of them from 0 on draw it whole.

    The noise at a position of a sample depends on `key`, the sample's index and the position alone,
    as in `sample_codes`; neither `first` nor `count` compiles anything anew. Steps in which all
    codes are known, and those after the last, cost nothing.

    Args:
        transformer: the module; its grid is the window.
        params: its parameters.
        conditions: the parts of the condition in the order of their tokens, as of
            `window_conditions`.
        key: the random key of all samples.
        indices: `(B,)` int, the samples' indices.
        filters: which codes may be drawn.
        codes: `(B, H, W)` int, what earlier steps returned; before the first step the known codes,
            and any codes elsewhere.
        known_mask: `(B, H, W)` bool, where codes are known: they are kept.
        first: the first step, from 0.
        count: how many steps.
        null_conditions: as `conditions`, for guidance: what stands for no condition.
        scales: `(H, W)`, the guidance scale at each code; with `null_conditions`.
        lag: columns that a row is behind the one above it. None for the window's columns: the
            fewest steps. More draws fewer rows at once, `ceil(W / lag)`; W draws row by row.
        middle: row and column of the window at which a code lies away from the edges. None for
            `(h // 2, w // 2)`.

    Returns:
        `(B, H, W)` int32: `codes` with code (i, j) drawn if `first <= lag * i + j < first + count`.

    Raises:
        ValueError: the grid is smaller than the window, `lag` is less than its columns, `middle` is
            outside of it, or the conditions are not those of such a grid.
    """
    batch, height, width = codes.shape
    window_rows, window_columns = transformer.grid
    lag = window_columns if lag is None else lag
    middle_row, middle_column = middle or (window_rows // 2, window_columns // 2)
    contexts = [conditions] if null_conditions is None else [conditions, null_conditions]
    _check_sizes(transformer, codes.shape, lag, contexts)
    if not (0 <= middle_row < window_rows and 0 <= middle_column < window_columns):
        raise ValueError(
            f"middle is ({middle_row}, {middle_column}), outside of the window of "
            f"{window_rows}x{window_columns} codes."
        )

    params = cast_kernels(params, transformer.dtype)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    slots = jnp.arange(min(-(-width // lag), height))
    # Up to this row a code lies in the middle row or above, and rows below that are not needed.
    last_upper = height - window_rows + middle_row

    def flat(tokens):
        return tokens.reshape(-1, tokens.shape[-1])

    def draw_at(rows, columns, seen_rows, codes):
        """The codes at places `(S,)`, `(B, S)`; of the window, `seen_rows` rows are looked at."""
        tops = jnp.clip(rows - middle_row, 0, height - window_rows)
        lefts = jnp.clip(columns - middle_column, 0, width - window_columns)
        given = [
            window_conditions(c, transformer.grid, (height, width), tops, lefts) for c in contexts
        ]
        seen = crop(codes, (seen_rows, window_columns), tops, lefts)[..., :-1]
        logits = transformer.apply(
            {"params": params},
            flat(jnp.concatenate(given)),
            flat(jnp.concatenate([seen] * len(given))),
            jnp.tile((rows - tops) * window_columns + columns - lefts, len(given) * batch),
            method="code_logits",
        )
        if len(given) > 1:
            logits = guide(logits, jnp.tile(scales[rows, columns], batch)[:, None])
        noise = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
            keys, rows * width + columns
        )
        drawn = draw(logits, filters, noise.reshape(-1)).reshape(batch, -1)
        return jnp.where(known_mask[:, rows, columns], codes[:, rows, columns], drawn)

    def take_step(step, codes):
        rows = jnp.minimum(step // lag, height - 1) - slots
        columns = step - lag * rows
        inside = (rows >= 0) & (columns < width)
        rows, columns = jnp.where(inside, rows, 0), jnp.where(inside, columns, 0)
        wanted = inside & ~known_mask[:, rows, columns].all(axis=0)

        def draw_with(seen_rows):
            def draw_and_place(codes):
                drawn = draw_at(rows, columns, seen_rows, codes)
                return codes.at[:, jnp.where(wanted, rows, height), columns].set(drawn, mode="drop")

            return draw_and_place

        branches = [lambda codes: codes, draw_with(middle_row + 1), draw_with(window_rows)]
        needed = jnp.where(wanted, jnp.where(rows <= last_upper, 1, 2), 0)
        return jax.lax.switch(needed.max(), branches, codes)

    first = jnp.asarray(first, jnp.int32)
    last = first + jnp.asarray(count, jnp.int32)
    return jax.lax.fori_loop(first, last, take_step, codes.astype(jnp.int32))


def window_conditions(
    parts: Sequence[jax.Array],
    window: tuple[int, int],
    grid: tuple[int, int],
    tops: jax.Array,
    lefts: jax.Array,
) -> jax.Array:
    """The condition tokens of windows.

    Args:
        parts: in the order of the tokens; `(B, n)` int for tokens that are the same for all
            windows; `(B, rows, columns)` int for a grid over the whole image, which is cropped with
            the window; `(B, H - h + 1, W - w + 1, n)` int for n tokens of each place of the window.
            A grid may be of larger or smaller tokens than codes; where a window begins within a
            larger one, its crop begins with that.
        window: h rows and w columns.
        grid: H rows and W columns of codes.
        tops: `(S,)` int, the windows' first rows.
        lefts: `(S,)` int, their first columns.

    Returns:
        `(B, S, num_conditions)`.
    """

    def tokens(part):
        if part.ndim == 4:
            return part[:, tops, lefts]
        if part.ndim == 3:
            rows, columns = part.shape[1:]
            begins = tops * rows // grid[0], lefts * columns // grid[1]
            return crop(part, _crop_size(part, window, grid), *begins)
        return jnp.broadcast_to(part[:, None], (len(part), len(tops), part.shape[1]))

    return jnp.concatenate([tokens(part) for part in parts], axis=-1)


def crop(grid: jax.Array, size: tuple[int, int], tops: jax.Array, lefts: jax.Array) -> jax.Array:
    """Parts of `(B, H, W)` that begin at rows and columns `(S,)`: `(B, S, rows * columns)`."""
    rows = tops[:, None, None] + jnp.arange(size[0])[:, None]
    columns = lefts[:, None, None] + jnp.arange(size[1])
    return grid[:, rows, columns].reshape(len(grid), len(tops), -1)


def _crop_size(part: jax.Array, window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a condition's grid `(B, rows, columns)` that lie over a window."""
    return window[0] * part.shape[1] // grid[0], window[1] * part.shape[2] // grid[1]


def _check_sizes(transformer, shape, lag, contexts):
    _, height, width = shape
    rows, columns = transformer.grid
    if height < rows or width < columns:
        raise ValueError(
            f"A grid of {height}x{width} codes is smaller than the transformer's window of "
            f"{rows}x{columns}; it must be at least as high and as wide."
        )
    if lag < columns:
        raise ValueError(
            f"lag is {lag}; below the window's {columns} columns, codes would be drawn before "
            "those that they depend on."
        )
    for parts in contexts:
        for part in parts:
            if part.ndim == 3 and not _fits(part, transformer.grid, shape):
                raise ValueError(
                    f"A condition's grid has shape {part.shape}; the codes' is {shape}: of rows "
                    "and of columns, one must be a multiple of the other, and a window of codes "
                    "must have whole tokens of the condition."
                )
            places = height - rows + 1, width - columns + 1
            if part.ndim == 4 and part.shape[1:3] != places:
                raise ValueError(
                    f"A condition has tokens for {part.shape[1]}x{part.shape[2]} places of the "
                    f"window; there are {places[0]}x{places[1]}."
                )
        count = sum(
            math.prod(_crop_size(part, transformer.grid, shape[1:]))
            if part.ndim == 3
            else part.shape[-1]
            for part in parts
        )
        if count != transformer.num_conditions:
            raise ValueError(
                f"The conditions are {count} tokens a window; the transformer was made for "
                f"{transformer.num_conditions}."
            )


def _fits(part: jax.Array, window: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether windows of codes lie over whole tokens of a condition's grid."""
    sides = zip(part.shape[1:], window, shape[1:], strict=True)
    return len(part) == shape[0] and all(
        max(own, whole) % min(own, whole) == 0 and size * own % whole == 0
        for own, size, whole in sides
    )
