"""Every number of a config has a range, and no value outside of it is taken."""

import json
import math

import pytest
from ml_collections import ConfigDict

from vqgan_jax import configuration
from vqgan_jax.configuration import (
    ConfigError,
    add_condition_image,
    tokenizer_config,
    transformer,
    transformer_config,
)
from vqgan_jax.configuration import tokenizer as tokenizer_module
from vqgan_jax.configuration.common import check_ranges
from vqgan_jax.configuration.documents import parse_json
from vqgan_jax.configuration.memory import available_bytes, require_memory
from vqgan_jax.configuration.ranges import defaults, number, numbers
from vqgan_jax.errors import DataError

CONFIGS = {
    "tokenizer": (tokenizer_config(), tokenizer_module.RANGES),
    "transformer": (transformer_config(), transformer.RANGES),
    "image": (
        ConfigDict(defaults(transformer.condition_image_section())),
        transformer.IMAGE_RANGES,
    ),
}
KEYS = [(stage, key) for stage, (_, ranges) in CONFIGS.items() for key in ranges]


def is_numeric(value):
    if isinstance(value, tuple):
        return any(map(is_numeric, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric_leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, ConfigDict):
            yield from numeric_leaves(value, f"{prefix}{key}.")
        elif is_numeric(value):
            yield f"{prefix}{key}"


@pytest.mark.parametrize("stage", CONFIGS)
def test_each_number_has_a_range_with_its_default(stage):
    config, ranges = CONFIGS[stage]
    assert set(numeric_leaves(config)) <= ranges.keys()
    check_ranges(config, ranges)


@pytest.mark.parametrize(("stage", "key"), KEYS)
def test_values_outside_are_refused_by_name(stage, key):
    config, ranges = CONFIGS[stage]
    known = ranges[key]
    outside = [
        known.low - 1 - abs(known.low) // 2,
        known.high * 2 + 1,
        math.nan,
        math.inf,
        -math.inf,
    ]
    outside += [known.low] * known.above + [known.high] * known.below + [None, "1", {}, [[]]]
    for value in outside:
        changed = ConfigDict(config, convert_dict=False).copy_and_resolve_references()
        length = known.length or (1, 1)
        wrong = value if known.length is None else (value,) * max(1, length[0])
        with changed.unlocked(), changed.ignore_type():
            changed.update_from_flattened_dict({key: wrong})
        with pytest.raises(ConfigError) as error:
            check_ranges(changed, ranges)
        assert f"config.{key} is " in str(error.value) and "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_the_forms_of_ranges():
    assert number(0.5, 0, 1).problem(1) is None and number(0.5, 0, 1, below=True).problem(1)
    assert number(3, 1, 9).problem(2.5) == "it must be at least 1 and at most 9"
    pair = numbers((1, 2), 1, 9, length=(2, 2))
    assert pair.problem((1, 9)) is None and "has 3 numbers" in pair.problem((1, 2, 3))
    assert pair.problem((1, 2.5)) == "each number must be at least 1 and at most 9"


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (tokenizer_config, {"training.best_metric": "lpip"}, "best_metric is 'lpip'"),
        (tokenizer_config, {"training.best_metric": "psnr"}, "one of lpips"),  # better when higher
        (transformer_config, {"training.best_metric": "lpips"}, "one of bits_per_code"),
        (tokenizer_config, {"model.attention_resolutions": (20,)}, "levels of this model have 256"),
        (tokenizer_config, {"data.name": "folder:"}, "without a path"),
        (tokenizer_config, {"data.name": ""}, "config.data.name is empty"),
        (tokenizer_config, {"data.data_dir": "~nobody_here/x"}, "there is no user of that name"),
        (transformer_config, {"data.codes": "~nobody_here"}, "there is no user of that name"),
        (tokenizer_config, {"model.channel_multipliers": ()}, "it has 0 numbers"),
        (tokenizer_config, {"mesh.data": 0}, "config.mesh.data is 0"),
    ],
)
def test_values_that_make_no_sense(make, changes, words):
    config = make()
    if config.stage == "transformer":
        config.tokenizer.path = "x"
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as error:
        configuration.validate(config)
    assert words in str(error.value) and "\n" not in str(error.value)


ODD = (None, "text", -1, 0, 10**9, 10**30, 0.5, True, [], {}, [[[1]]], ["a"] * 1000, 1e308)


def stored_configs():
    yield tokenizer_config()
    config = transformer_config()
    add_condition_image(config, "depth", "x")
    yield config


def test_stored_configs_are_compared_with_their_form():
    """Each key replaced by odd values: what is read is a config of today's types, or an error."""
    for config in stored_configs():
        good = parse_json(configuration.to_json(config))
        sections = [section for section in good if isinstance(good[section], dict)]
        paths = [(section, key) for section in sections for key in good[section]]
        for i, (section, key) in enumerate(paths):
            for value in (ODD[i % len(ODD)], ODD[(5 * i + 3) % len(ODD)]):
                text = json.dumps(good | {section: good[section] | {key: value}})
                try:
                    found = configuration.from_json(text)
                    configuration.validate_stored(found)
                except ConfigError as error:
                    assert "\n" not in str(error) and len(str(error)) < 400
                else:
                    assert isinstance(found[section][key], type(config[section][key]) | int)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"stage": "x"}', '{"stage": ["tokenizer"]}', "[" * 100_000,
     '{"stage": "tokenizer", "seed": ' + "9" * 10_000 + "}", '{"stage": "tokenizer", "a": 1}',
     '{"stage": "tokenizer", "model": ' + '{"a":' * 100 + "1" + "}" * 100 + "}",
     '{"stage": "tokenizer", "seed": NaN}', b"\xff\xfe"],
)  # fmt: skip
def test_texts_that_are_no_config(text):
    with pytest.raises(ConfigError) as error:
        configuration.from_json(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_documents_are_bounded():
    for text in ("[" * 65 + "]" * 65, "1e999", "Infinity"):
        with pytest.raises(DataError):
            parse_json(text)
    assert parse_json("[" * 60 + "]" * 60) and parse_json("1e-999") == 0.0


def test_memory():
    assert available_bytes() > 2**28
    require_memory(2**20, "A little", "take less")
    with pytest.raises(ConfigError, match=r"A lot needs 1,048,576\.0 GiB or more, .*; take less\."):
        require_memory(2**50, "A lot", "take less")
