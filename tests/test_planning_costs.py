"""What is read off compiled programs, against XLA's own counts, NumPy and arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vqgan_jax.planning import costs
from vqgan_jax.planning.hlo import Program


def compiled(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arguments).compile()


def layers(unroll):
    def loss(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(layer, x, weights, unroll=unroll)[0].sum()

    return jax.grad(loss)


def test_loops_count_as_often_as_they_run():
    """XLA counts their bodies once; with all layers unrolled it counts what we count."""
    shapes = (7, 64, 64), (32, 64)
    scanned, unrolled = (compiled(layers(unroll), *shapes) for unroll in (1, 7))
    expected = 2 * 32 * 64 * 64 * 7 * 3 - 2 * 32 * 64 * 64  # the first layer's input has none
    ours = costs.product_flops(Program(scanned.as_text()))
    assert ours in (expected, expected + 2 * 32 * 64 * 64)
    assert ours == pytest.approx(unrolled.cost_analysis()["flops"], rel=0.05)
    once = costs.product_flops(Program(scanned.as_text()), loops_once=True)
    assert once == pytest.approx(scanned.cost_analysis()["flops"], rel=0.05)
    assert once < ours / 5


def test_loops_in_loops():
    def function(x):
        def outer(_, x):
            return jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x)

        return jax.lax.fori_loop(0, 3, outer, x)

    program = Program(compiled(function, (16, 16)).as_text())
    assert costs.product_flops(program) == 15 * 2 * 16**3


@pytest.mark.parametrize(
    "stride, padding, dilation, base",
    [(1, (1, 1), 1, 1), (2, (0, 1), 1, 1), (1, (2, 2), 2, 1), (1, (2, 1), 1, 2), (3, (0, 0), 1, 1)],
)
def test_convolutions_count_what_meets_an_input(stride, padding, dilation, base):
    """By going over all places in NumPy, and by XLA."""
    size, kernel, channels = 9, 3, (4, 8)

    def function(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            (padding, padding),
            lhs_dilation=(base, base),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    program = compiled(function, (2, size, size, channels[0]), (kernel, kernel, *channels))
    output = jax.eval_shape(
        function,
        jnp.zeros((2, size, size, channels[0])),
        jnp.zeros((kernel, kernel, *channels)),
    ).shape[1]
    spread = np.zeros((size - 1) * base + 1, bool)
    spread[::base] = True
    spread = np.pad(spread, padding)
    met = sum(
        int(spread[place * stride + tap * dilation])
        for place in range(output)
        for tap in range(kernel)
    )
    counted = costs.product_flops(Program(program.as_text()))
    assert counted == 2 * 2 * met**2 * channels[0] * channels[1]
    assert counted == pytest.approx(program.cost_analysis()["flops"], rel=0.02)


def on_mesh(function, *specs, shapes):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    whole = NamedSharding(mesh, PartitionSpec())
    return Program(jax.jit(function, out_shardings=whole).lower(*arguments).compile().as_text())


def test_collectives_and_what_a_chip_sends():
    """A product over the split dimension is reduced; what is split is gathered."""
    reduced = on_mesh(lambda x, w: x @ w, (None, "x"), ("x",), shapes=((16, 64), (64, 32)))
    (exchange,) = costs.collectives(reduced)
    assert (exchange.kind, exchange.bytes, exchange.group) == ("all-reduce", 16 * 32 * 4, 8)
    assert exchange.sent == 2 * 7 / 8 * 16 * 32 * 4

    gathered = on_mesh(lambda x: x, ("x",), shapes=((64, 32),))
    (exchange,) = costs.collectives(gathered)
    assert (exchange.kind, exchange.bytes, exchange.group) == ("all-gather", 64 * 32 * 4, 8)
    assert exchange.sent == 7 / 8 * 64 * 32 * 4


def test_collectives_in_loops():
    def function(weights, x):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    program = on_mesh(function, (None, "x"), (), shapes=((5, 64, 64), (16, 64)))
    runs = {exchange.kind: exchange.runs for exchange in costs.collectives(program)}
    assert runs["all-reduce"] == 5


def test_bytes_of_slices():
    """An operation that takes a row of a large array does not read all of it."""
    whole, row = (1024, 256), 256 * 4

    def function(x, i):
        return jax.lax.dynamic_slice_in_dim(x, i, 1) * 2.0

    lowered = jax.jit(function).lower(
        jax.ShapeDtypeStruct(whole, jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    )
    moved = costs.memory_bytes(Program(lowered.compile().as_text()))
    assert 2 * row <= moved <= 4 * row
    added = compiled(lambda x, y: x + y, whole, whole)
    assert costs.memory_bytes(Program(added.as_text())) == 3 * 4 * 1024 * 256


# As compilers for TPUs write: no trip count, fast memory S(1), copies of what runs in parts.
TEXT = """\
HloModule jit_step, is_scheduled=true

%condition (state: (s32[], bf16[64,128])) -> pred[] {
  %state = (s32[], bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %state.1 = (s32[], bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %step)
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %w = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} broadcast(%x), dimensions={}
  %whole = bf16[64,1024]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, \
replica_groups=mesh['a'=16,'b'=1,'c'=16], device_ids=([16,16]T(1,0)) {'a'}, dimensions={1}
  %again = bf16[64,1024]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, \
replica_groups=mesh['a'=16,'b'=1,'c'=16], device_ids=([16,16]T(1,0)) {'a'}, dimensions={1}
  %y = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %out = (s32[], bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%next, %y)
}

ENTRY %main (argument: bf16[64,128]) -> bf16[64,128] {
  %argument = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(4)
  %begin = s32[]{:T(128)} copy(%zero)
  %all = (s32[], bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%begin, %argument)
  %loop = (s32[], bf16[64,128]{1,0:T(8,128)(2,1)}) while(%all), condition=%condition, body=%body
  ROOT %result = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_loops_from_a_number_to_a_number_by_steps():
    program = Program(TEXT)
    assert program.runs["body"] == 4  # 4, 6, 8, 10
    assert costs.product_flops(program) == 4 * 2 * 64 * 128 * 128
    (exchange,) = costs.collectives(program)
    assert (exchange.bytes, exchange.group, exchange.runs) == (64 * 1024 * 2, 16, 4)
    other = TEXT.replace("mesh['a'=16,'b'=1,'c'=16], device_ids=([16,16]T(1,0)) {'a'}", "{}")
    other = other.replace("is_scheduled=true", "is_scheduled=true, num_partitions=32")
    assert costs.collectives(Program(other))[0].group == 32  # all of them
    part = TEXT.replace("T(1,0)) {'a'}", "T(1,0)) {'a':(1)4}")
    assert costs.collectives(Program(part))[0].group == 4
    # Of the product: x is read and y written; w is in fast memory.
    product = next(i for i in program.computations["body"].values() if i.opcode == "convolution")
    moved = costs._moved(program, program.computations["body"], product)
    assert moved == 2 * 64 * 128 * 2


# A layer's part of what is stacked, read within a fused operation in a fused operation; a buffer
# that is only handed on; a row that is written in place.
FUSED = """\
HloModule jit_step, is_scheduled=true

%inner (stacked.1: f32[48,128,128], i.1: s32[]) -> f32[128,128] {
  %stacked.1 = f32[48,128,128]{2,1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %layer = f32[1,128,128]{2,1,0:T(8,128)} dynamic-slice(%stacked.1, %i.1), \
dynamic_slice_sizes={1,128,128}
  ROOT %flat = f32[128,128]{1,0:T(8,128)} bitcast(%layer)
}

%outer (x.1: f32[128,128], stacked.2: f32[48,128,128], i.2: s32[], sent.1: f32[64,128,128]) \
-> (f32[128,128], f32[64,128,128]) {
  %x.1 = f32[128,128]{1,0:T(8,128)} parameter(0)
  %stacked.2 = f32[48,128,128]{2,1,0:T(8,128)} parameter(1)
  %i.2 = s32[]{:T(128)} parameter(2)
  %sent.1 = f32[64,128,128]{2,1,0:T(8,128)} parameter(3)
  %one = f32[128,128]{1,0:T(8,128)} fusion(%stacked.2, %i.2), kind=kLoop, calls=%inner
  %sum = f32[128,128]{1,0:T(8,128)} add(%x.1, %one)
  ROOT %both = (f32[128,128]{1,0:T(8,128)}, f32[64,128,128]{2,1,0:T(8,128)}) tuple(%sum, %sent.1)
}

%in_place (all.1: f32[48,128], row.1: f32[1,128], i.3: s32[]) -> f32[48,128] {
  %all.1 = f32[48,128]{1,0:T(8,128)} parameter(0)
  %row.1 = f32[1,128]{1,0:T(8,128)} parameter(1)
  %i.3 = s32[]{:T(128)} parameter(2)
  ROOT %new = f32[48,128]{1,0:T(8,128)} dynamic-update-slice(%all.1, %row.1, %i.3)
}

ENTRY %main (x: f32[128,128], stacked: f32[48,128,128], i: s32[], sent: f32[64,128,128], \
all: f32[48,128], row: f32[1,128]) -> f32[128,128] {
  %x = f32[128,128]{1,0:T(8,128)} parameter(0)
  %stacked = f32[48,128,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %sent = f32[64,128,128]{2,1,0:T(8,128)} parameter(3)
  %all = f32[48,128]{1,0:T(8,128)} parameter(4)
  %row = f32[1,128]{1,0:T(8,128)} parameter(5)
  %layer_and_sent = (f32[128,128]{1,0:T(8,128)}, f32[64,128,128]{2,1,0:T(8,128)}) \
fusion(%x, %stacked, %i, %sent), kind=kOutput, output_to_operand_aliasing={{1}: (3, {})}, \
calls=%outer
  %written = f32[48,128]{1,0:T(8,128)} fusion(%all, %row, %i), kind=kLoop, calls=%in_place
  ROOT %result = f32[128,128]{1,0:T(8,128)} get-tuple-element(%layer_and_sent), index=0
}
"""


def test_bytes_of_fused_operations():
    program = Program(FUSED)
    entry = program.computations["main"]
    layer, row = 128 * 128 * 4, 128 * 4
    assert costs._moved(program, entry, entry["layer_and_sent"]) == 3 * layer
    assert costs._moved(program, entry, entry["written"]) == 2 * row
