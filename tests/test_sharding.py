"""Where parameters lie by the config's rules, and what compiled steps hold and move for it."""

import jax
import pytest
from jax.sharding import PartitionSpec

from tiny_plans import small_tokenizer, small_transformer
from vqgan_jax.configuration import ConfigError, validate
from vqgan_jax.configuration.common import SHARDING_RULES
from vqgan_jax.models.target import planned_for
from vqgan_jax.planning import costs
from vqgan_jax.planning.hlo import Program
from vqgan_jax.planning.programs import planned_programs, planned_state
from vqgan_jax.training.sharding import bytes_on_device, make_mesh, path_name, sharding_table

MESHES = [
    dict(data=8),
    dict(fsdp=8, data=1),
    dict(tensor=8, data=1),
    dict(data=2, fsdp=2, tensor=2),
]


def specs(config):
    state = planned_state(config, make_mesh(config.mesh))
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_name(path): leaf.sharding.spec for path, leaf in flat}


def test_rules_of_the_transformer():
    found = specs(small_transformer(fsdp=2, tensor=2, data=-1))
    for state in ("params", "opt_state/0/mu", "opt_state/0/nu"):
        block = f"{state}/blocks"
        assert found[f"{block}/attention/query/kernel"] == PartitionSpec(None, "fsdp", "tensor")
        assert found[f"{block}/attention/out/kernel"] == PartitionSpec(None, "tensor", "fsdp")
        assert found[f"{block}/feed_forward/up/kernel"] == PartitionSpec(None, "fsdp", "tensor")
        assert found[f"{block}/feed_forward/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
        assert found[f"{state}/head/kernel"] == PartitionSpec("fsdp", "tensor")
        assert found[f"{block}/attention_norm/scale"] == PartitionSpec(None, None)


def test_rules_of_the_tokenizer():
    found = specs(small_tokenizer(blocks=1, fsdp=4, tensor=2, data=-1))
    block = "generator/params/encoder/down_1/block_0"
    assert found[f"{block}/conv1/kernel"] == PartitionSpec(None, None, "fsdp", "tensor")
    assert found[f"{block}/conv2/kernel"] == PartitionSpec(None, None, "tensor", "fsdp")
    assert found[f"{block}/conv2/bias"] == PartitionSpec(None)
    assert found["generator/params/quantize/codebook"] == PartitionSpec(None, None)
    # Three colours cannot be split; the rule takes the largest dimension that can.
    assert found["generator/params/encoder/conv_in/kernel"][3] == "fsdp"
    assert found["discriminator/params/conv_0/kernel"][3] == "fsdp"


def test_own_rules_come_first():
    config = small_transformer(fsdp=4, data=-1)
    config.sharding_rules = (("up/kernel$", ()), *SHARDING_RULES)
    found = specs(config)
    assert found["params/blocks/feed_forward/up/kernel"] == PartitionSpec(None, None, None)
    assert found["params/blocks/feed_forward/down/kernel"][2] == "fsdp"


def test_table():
    config = small_transformer(fsdp=4, data=-1)
    state = planned_state(config, make_mesh(config.mesh))
    lines = sharding_table(state).splitlines()
    (line,) = (one for one in lines if one.startswith("params/blocks/feed_forward/up/kernel"))
    assert line.split()[1:] == ["[2,", "128,", "512]", "float32", "-,", "fsdp,", "-", "131,072"]
    held = sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(state))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert lines[-1] == f"all: {held:,} bytes on a device of {whole:,}"
    assert held < whole / 3


@pytest.mark.parametrize(
    "wrong", [dict(data=3), dict(data=-1, fsdp=-1), dict(fsdp=16), dict(tensor=0)]
)
def test_a_mesh_that_does_not_fit(wrong):
    config = small_transformer(**wrong)
    with pytest.raises(ConfigError, match=r"config\.mesh"):
        make_mesh(config.mesh)


def programs_of(config):
    """The compiled steps of a config on eight simulated devices, by name."""
    mesh = make_mesh(config.mesh)
    return {one.name: one for one in planned_programs(config, mesh, None) if one.trains}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [small_transformer, small_tokenizer])
def test_bytes_on_a_device_fall_as_the_mesh_says(stage):
    """By the compiled program's own account of its arguments."""
    found = {}
    # A convolutional network takes ten times as long to compile, and its rules are the same.
    meshes = MESHES[:2] if stage is small_tokenizer else MESHES
    for mesh in meshes:
        config = stage(**mesh)
        name, planned = next(iter(programs_of(config).items()))
        arguments = planned.lower().compile().memory_analysis().argument_size_in_bytes
        assert arguments == pytest.approx(sum(planned.bytes_held.values()), rel=0.02), name
        state = sum(held for kind, held in planned.bytes_held.items() if kind != "batch")
        found[tuple(mesh.items())] = (arguments - planned.bytes_held["batch"], state)
    whole = found[tuple(MESHES[0].items())][0]
    assert found[tuple(MESHES[1].items())][0] < whole / 6  # what is whole are biases and codebook
    for mesh in meshes[2:]:
        assert found[tuple(mesh.items())][0] < whole / 2


def largest_array(state):
    """Bytes of the largest layer's parameter."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    sizes = [
        leaf.size * 4 / (leaf.shape[0] if "blocks" in path_name(path) else 1)
        for path, leaf in flat
        if "params" in path_name(path)
    ]
    return max(sizes)


def forwards(exchanges):
    """Those of the forward pass: none of them is of gradients."""
    return [one for one in exchanges if one.source and "transpose(" not in one.source]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [small_transformer, small_tokenizer])
def test_fully_sharded_steps_gather_one_layer_at_a_time(stage):
    """Neither activations, which here are larger than any parameter, nor all parameters at once."""
    config = stage(fsdp=8, data=1)
    limit = largest_array(planned_state(config, make_mesh(config.mesh)))
    for name, planned in programs_of(config).items():
        exchanges = costs.collectives(Program(planned.lower().compile().as_text()))
        gathered = [one for one in exchanges if one.kind == "all-gather"]
        assert gathered, name
        assert max(one.bytes for one in gathered) <= limit, name
        assert max(one.bytes for one in forwards(exchanges)) <= limit, name
        # Each parameter comes to a device at most three times: forwards, backwards, and again.
        total = sum(one.bytes * one.runs for one in gathered)
        assert total <= 3 * planned.bytes_held["parameters"] * 8, name


def vision_transformers(**options):
    config = small_tokenizer(**options)
    config.model.architecture = "vit"
    config.model.vit.patch = 4
    for network in (config.model.vit.encoder, config.model.vit.decoder):
        network.update(layers=1, heads=2, width=32)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("stage", [small_tokenizer, vision_transformers])
def test_rows_of_pixels_are_split(stage):
    """Work and temporaries fall with the devices that share images, in accelerators' forms."""
    held, flops = {}, {}
    for spatial in (1, 4):
        config = stage(batch_size=4, resolution=64, data=2, spatial=spatial)
        mesh = make_mesh(config.mesh, jax.devices()[: 2 * spatial])
        with planned_for("tpu"):
            compiled = planned_programs(config, mesh, None)[0].lower().compile()
        held[spatial] = compiled.memory_analysis().temp_size_in_bytes
        flops[spatial] = costs.product_flops(Program(compiled.as_text()))
    assert held[4] < held[1] / 2.5
    assert flops[4] < flops[1] / 3


RULES = [
    (("kernel$", "foo"), "axes are data, fsdp, tensor, spatial"),
    (("kernel$", ("fsdp", "fsdp")), "each once"),
    (("(", ()), "unterminated"),
    ("kernel$", "a rule is a pattern and its axes"),
]


@pytest.mark.parametrize("rule, message", RULES)
def test_rules_that_cannot_be(rule, message):
    config = small_tokenizer()
    config.sharding_rules = (rule,)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_rows_of_pixels_that_cannot_be_split():
    for spatial in (3, -1):
        with pytest.raises(ConfigError, match=rf"config\.mesh\.spatial is {spatial}"):
            validate(small_tokenizer(spatial=spatial))
    with pytest.raises(ConfigError, match="only tokenizers"):
        validate(small_transformer(spatial=2))
