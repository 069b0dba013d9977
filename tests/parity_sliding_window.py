"""The replay of the reference's greedy decoding through a sliding window, for `parity.py`."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.interop.taming_gpt import gpt_params_from_state_dict
from vqgan_jax.models.transformer import Transformer
from vqgan_jax.sampling.filters import Filters
from vqgan_jax.sampling.sliding_window import num_steps, sample_steps


def replay_sliding_window(golden: Mapping[str, np.ndarray], meta: Mapping) -> dict[str, np.ndarray]:
    """The grid, row by row and by the wavefront."""
    dtype = jnp.zeros(()).dtype  # float64 where JAX is told to have it
    state_dict = {k.removeprefix("params/"): v for k, v in golden.items() if k[:7] == "params/"}
    params = gpt_params_from_state_dict(state_dict)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    window = meta["window"]
    batch, height, width = golden["init"].shape
    conditions = golden["cond"] if meta["conditional"] else np.full((batch, 1), meta["sos_token"])
    transformer = Transformer(
        codebook_size=meta["vocab"],
        grid=(window, window),
        num_conditions=window * window if meta["conditional"] else 1,
        condition_size=0,
        max_length=len(params["position_embedding"]),
        num_layers=meta["n_layer"],
        num_heads=meta["n_head"],
        num_kv_heads=meta["n_head"],
        width=meta["n_embd"],
        hidden=4 * meta["n_embd"],
        dtype=dtype,
    )
    numbers = np.arange(height * width).reshape(height, width)
    results = {}
    for way, lag in (("rows", width), ("wavefront", window)):
        results[f"result@{way}"] = jax.jit(functools.partial(sample_steps, transformer, lag=lag))(
            params,
            [conditions],
            jax.random.key(0),
            np.arange(batch),
            Filters(temperature=0.0),
            golden["init"],
            np.broadcast_to(numbers < golden["start"], golden["init"].shape),
            0,
            num_steps(height, width, lag),
        )
    return results
