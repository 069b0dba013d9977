"""The reference's permuters: exports with an order of codes, their numbers, the way back."""

import numpy as np
import pytest
import yaml

import vqgan_jax
from test_orders import FOUR_BY_FOUR
from test_taming_conditions import first_stage
from test_taming_transformer import GOLDEN, description_of, logits_of, state_dict_of
from vqgan_jax.interop import conversion
from vqgan_jax.interop.taming_options import ConversionError
from vqgan_jax.interop.taming_permuters import check_buffers, permuter_buffers
from vqgan_jax.interop.taming_transformer import (
    transformer_from_state_dict,
    transformer_state_dict_of,
)
from vqgan_jax.interop.taming_transformer_yaml import transformer_from_yaml
from vqgan_jax.interop.torch_file import read_checkpoint
from vqgan_jax.interop.torch_writer import write_checkpoint

SIDE = 4
CLASSES = {
    "alternate": "AlternateParsing",
    "subsample": "Subsample",
    "z_curve": "ZCurve",
    "spiral_out": "SpiralOut",
    "spiral_in": "SpiralIn",
    "random": "Random",
}


def sequence_of(order):
    """The numbers of codes as the reference prints them."""
    return np.array([int(number) for number in FOUR_BY_FOUR[order].split()])


def permuter(order, **params):
    target = f"taming.modules.transformer.permuter.{CLASSES[order]}"
    return {"permuter_config": {"target": target, "params": {"H": SIDE, "W": SIDE} | params}}


def buffers(order):
    sequence = sequence_of(order)
    inverse = np.array([np.flatnonzero(sequence == place)[0] for place in range(SIDE**2)])
    return {"permuter.forward_shuffle_idx": sequence, "permuter.backward_shuffle_idx": inverse}


def test_all_orders_have_their_class():
    assert CLASSES.keys() == FOUR_BY_FOUR.keys() - {"row_major"}


@pytest.mark.parametrize("order", CLASSES)
def test_every_order_is_recognised_and_has_the_same_buffers(order):
    model = transformer_from_yaml(description_of(first_stage(), **permuter(order))).config.model
    assert model.order == order
    check_buffers(state_dict_of() | buffers(order), model)
    found = permuter_buffers(model)
    assert found.keys() == buffers(order).keys()
    for name, value in buffers(order).items():
        np.testing.assert_array_equal(found[name], value, name)


@pytest.mark.parametrize("order", ["z_curve", "spiral_in"])
def test_there_and_back_with_the_numbers_of_the_reference(tmp_path, capsys, order):
    """Its GPT sees the golden tokens as a sequence; here they stand at their places."""
    stored = state_dict_of() | buffers(order)
    write_checkpoint(tmp_path / "x.ckpt", {"state_dict": stored})
    description = yaml.safe_dump(description_of(first_stage(), **permuter(order)))
    (tmp_path / "x.yaml").write_text(description)
    conversion.convert(tmp_path / "x.ckpt", tmp_path / "x.yaml", tmp_path / "export")
    assert f"4x4 codes in the order {order}" in capsys.readouterr().out
    generator = vqgan_jax.load(tmp_path / "export")
    assert generator.config.model.order == order

    conditions, sequence = GOLDEN["idx"][:, :1], GOLDEN["idx"][:, 1 : SIDE**2 + 1]
    codes = np.zeros_like(sequence)
    codes[:, sequence_of(order)] = sequence
    logits = np.asarray(logits_of(generator)(conditions, codes))
    np.testing.assert_allclose(
        logits[:, sequence_of(order)], GOLDEN["logits"][:, : SIDE**2], atol=1e-5
    )

    conversion.convert_back(tmp_path / "export", tmp_path / "back.ckpt")
    found = read_checkpoint(tmp_path / "back.ckpt")["state_dict"]
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(found[name], value, name)
        assert found[name].dtype == value.dtype, name
    again = yaml.safe_load((tmp_path / "back.yaml").read_text())["model"]["params"]
    assert again["permuter_config"] == permuter(order)["permuter_config"]


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (
            {"permuter_config": {"target": "x.Hilbert"}},
            "is 'x.Hilbert'; supported are Identity, Alt",
        ),
        ({"permuter_config": {}}, "permuter_config.target is None; supported are Identity"),
        (permuter("z_curve", H=8), "permuter_config.params.H is 8, and the model's grid has 4x4"),
        (permuter("random", W=None), "W is None; it must be of type int"),
    ],
)
def test_what_the_yaml_may_not_say(params, problem):
    with pytest.raises(ConversionError) as caught:
        transformer_from_yaml(description_of(first_stage(), **params))
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_an_order_that_does_not_exist_for_the_grid():
    params = permuter("z_curve", H=6, W=6)
    with pytest.raises(ConversionError, match="target is 'ZCurve': The order .* not 6 x 6"):
        transformer_from_yaml(description_of(first_stage(6), **params))


@pytest.mark.parametrize(
    ("changes", "stored", "problem"),
    [
        ({}, buffers("spiral_in"), "order of codes is SpiralIn (permuter.*) and the yaml's Ident"),
        (permuter("z_curve"), {}, "order of codes is Identity (permuter.*) and the yaml's ZCurve"),
        (permuter("z_curve"), buffers("random"), "Random (permuter.*) and the yaml's ZCurve"),
        (
            permuter("z_curve"),
            {name: values[::-1] for name, values in buffers("random").items()},
            "order of codes (permuter.*) is none of the reference's for 4x4 codes (Identity, A",
        ),
        (
            permuter("z_curve"),
            buffers("z_curve") | {"permuter.backward_shuffle_idx": np.arange(16)},
            "none of the reference's",
        ),
        (
            permuter("random"),
            {"permuter.forward_shuffle_idx": sequence_of("random")},
            "none of the reference's",
        ),
    ],
)
def test_orders_that_do_not_belong_together(changes, stored, problem):
    description = transformer_from_yaml(description_of(first_stage(), **changes))
    state_dict = transformer_state_dict_of(state_dict_of() | stored)
    with pytest.raises(ConversionError) as caught:
        transformer_from_state_dict(state_dict, description)
    assert problem in str(caught.value) and "\n" not in str(caught.value)
