"""Classifier-free guidance ("Classifier-Free Diffusion Guidance", Ho and Salimans 2022).

The model is asked twice, with the condition and without; logits go on beyond the first, away from
the second. A scale a position allows schedules over the image.
"""

import jax
import jax.numpy as jnp
import numpy as np

SCHEDULES = ("constant", "linear", "cosine")


def guidance_scales(scale: float, num_codes: int, schedule: str = "constant") -> np.ndarray:
    """The scale at each code, `(num_codes,)` float32.

    `constant` is `scale` throughout; `linear` and `cosine` rise from 1, which is no guidance, at
    the first code to `scale` at the last.

    Raises:
        ValueError: there is no such schedule.
    """
    share = np.linspace(0.0, 1.0, num_codes) if num_codes > 1 else np.ones(1)
    if schedule == "constant":
        share = np.ones(num_codes)
    elif schedule == "cosine":
        share = (1.0 - np.cos(np.pi * share)) / 2.0
    elif schedule != "linear":
        raise ValueError(f"There is no guidance schedule {schedule!r}; take {SCHEDULES}.")
    return (1.0 + (scale - 1.0) * share).astype(np.float32)


def guide(logits: jax.Array, scale: jax.Array) -> jax.Array:
    """Logits `(2 B, K)`, of the conditions and then without any -> `(B, K)`; 1 is no guidance."""
    conditional, unconditional = jnp.split(logits, 2)
    return unconditional + scale * (conditional - unconditional)
