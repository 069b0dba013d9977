"""What the programs that are traced now will run on: a backend, and devices that share batches."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_PLANNED: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")
_SPLIT: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar("split", default=None)


def backend() -> str:
    """ "cpu", "gpu" or "tpu": the one that is here, or the one that is planned for."""
    return _PLANNED.get() or jax.default_backend()


@contextlib.contextmanager
def planned_for(name: str) -> Iterator[None]:
    """Programs traced within are for another backend than the one that is here."""
    token = _PLANNED.set(name)
    try:
        yield
    finally:
        _PLANNED.reset(token)


@contextlib.contextmanager
def rows_split_over(mesh: Mesh, axes: Sequence[str]) -> Iterator[None]:
    """Programs traced within have the rows of their batches split over these axes."""
    token = _SPLIT.set(NamedSharding(mesh, PartitionSpec(tuple(axes))))
    try:
        yield
    finally:
        _SPLIT.reset(token)


def keep_rows(x: jax.Array) -> jax.Array:
    """`(B, ...)` as it is, and its gradient, split by rows as `rows_split_over` says.

    Where parameters are split over the same devices as the batch, the compiler could as well move
    activations to where the parameters are; so it moves parameters, which are smaller. Other
    dimensions are left to it.
    """
    split = _SPLIT.get()
    if split is None:
        return x
    ways = math.prod(split.mesh.shape[axis] for axis in split.spec[0])
    if ways == 1 or x.shape[0] % ways:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(split.mesh, PartitionSpec(split.spec[0], *rest))
    )


def whole(table: jax.Array) -> jax.Array:
    """A parameter that rows are looked up in, on every device as a whole.

    Each device would else look up the rows of all others in its part of the table, and hand round
    what it found: as much as the activations of all of them.
    """
    split = _SPLIT.get()
    if split is None:
        return table
    return jax.lax.with_sharding_constraint(table, NamedSharding(split.mesh, PartitionSpec()))
