"""What devices can compute at most, and what a transformer's step needs: the share of the peak."""

import jax

from vqgan_jax.models.transformer import Transformer

# Dense bfloat16 FLOP/s of a device, by the beginning of its kind; from the makers' data sheets.
_PEAKS = {
    "TPU v3": 61.5e12,  # of a core, which JAX calls a device
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that a device reaches at most in bfloat16; None where it is not known."""
    return next(
        (peak for kind, peak in _PEAKS.items() if device.device_kind.startswith(kind)), None
    )


def forward_flops(transformer: Transformer, num_codes: int) -> float:
    """Floating-point operations of a forward pass over one sequence.

    Of matrix products alone, a multiplication and an addition counted as two, and of attention the
    whole square, as compilers compute it. A training step needs three times as many.
    """
    length = transformer.num_conditions + num_codes - 1
    width, head_dim = transformer.width, transformer.width // transformer.num_heads
    projections = 2 * width + 2 * transformer.num_kv_heads * head_dim
    matrices = 3 if transformer.feed_forward == "swiglu" else 2
    attention = 2 * length * width  # to the logits, and from the weights
    layer = width * projections + matrices * width * transformer.hidden + attention
    head = width * transformer.codebook_size * num_codes
    return 2.0 * (length * transformer.num_layers * layer + head)
