"""What devices can do at most, and what a transformer's step needs: the share of the peak."""

import dataclasses

import jax

from vqgan_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX calls a device, from its maker's data sheet.

    Attributes:
        flops: dense bfloat16 operations a second.
        memory: bytes of main memory that programs can have.
        bandwidth: of the main memory, bytes a second.
        interconnect: bytes a second that it sends to the others of its slice or machine.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float


_GIB = 2**30
# By the beginning of a device's kind. On v3 and tpu7x a device is half a chip.
_CHIPS = {
    "TPU v3": Chip(61.5e12, 16 * _GIB, 450e9, 82e9),
    "TPU v4": Chip(275e12, 32 * _GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 15.75 * _GIB, 819e9, 200e9),
    "TPU v5e": Chip(197e12, 15.75 * _GIB, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * _GIB, 2765e9, 600e9),  # v5p
    "TPU v6": Chip(918e12, 31.25 * _GIB, 1638e9, 448e9),  # v6e
    "TPU7x": Chip(1153e12, 95 * _GIB, 3690e9, 600e9),
    "NVIDIA A100": Chip(312e12, 80 * _GIB, 2039e9, 300e9),
    "NVIDIA H100": Chip(989e12, 80 * _GIB, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141 * _GIB, 4800e9, 450e9),
    "NVIDIA L4": Chip(121e12, 24 * _GIB, 300e9, 32e9),
    "Tesla V100": Chip(125e12, 32 * _GIB, 900e9, 150e9),
}


def chip_of(device: jax.Device) -> Chip | None:
    """What a device can do at most; None where it is not known."""
    return next(
        (chip for kind, chip in _CHIPS.items() if device.device_kind.startswith(kind)), None
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
