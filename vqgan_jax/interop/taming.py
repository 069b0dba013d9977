"""Checkpoints of CompVis/taming-transformers to ours and back.

"Taming Transformers for High-Resolution Image Synthesis" (Esser et al. 2021). Its tokenizers are
the classes VQModel, GumbelVQ and VQSegmentationModel; a model is a yaml that describes it and a
PyTorch file with its state dict (`taming_yaml.py` reads the yaml, `torch_file.py` the file).
Convolution kernels are OIHW there and HWIO here.

The names and shapes that a state dict must have are derived from our own modules, so what is here
is only how each part of a name is called over there.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vqgan_jax.interop.taming_options import ConversionError, some
from vqgan_jax.interop.taming_yaml import reference_class
from vqgan_jax.interop.wrappers import unwrap
from vqgan_jax.models.discriminator import PatchDiscriminator
from vqgan_jax.models.nearest import l2_normalize
from vqgan_jax.models.vqgan import VQGAN

_DISCRIMINATOR = "loss.discriminator."


@dataclasses.dataclass(frozen=True)
class Report:
    """What `variables_from_state_dict` found.

    Attributes:
      model: the reference's class.
      parameters: the number of the tokenizer's weights.
      codebook: (codes, dimensions).
      left_out: for each group of tensors that the tokenizer does not need, how many there were.
    """

    model: str
    parameters: int
    codebook: tuple[int, int]
    left_out: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the reference: its shape, its place in our tree, and how it is laid out."""

    shape: tuple[int, ...]
    path: tuple[str, ...]
    layout: str = "same"  # or "convolution" (OIHW), or "channels" (1, C, 1, 1)

    def ours(self, value: np.ndarray) -> np.ndarray:
        if self.layout == "convolution":
            value = value.transpose(2, 3, 1, 0)
        if self.layout == "channels":
            value = value.reshape(-1)
        return np.array(value, np.float32, order="C")

    def theirs(self, value: np.ndarray) -> np.ndarray:
        value = np.asarray(value, np.float32)
        if self.layout == "convolution":
            value = value.transpose(3, 2, 0, 1)
        return np.ascontiguousarray(value).reshape(self.shape)


_GENERATOR_NAMES = (
    (r"/mid/attention_1/", "/mid/attn_1/"),
    (r"/(down|up)_(\d+)/", r"/\1/\2/"),
    (r"(?<=\d)/block_(\d+)/", r"/block/\1/"),
    (r"(?<=\d)/attention_(\d+)/", r"/attn/\1/"),
    (r"/shortcut/", "/nin_shortcut/"),
    (r"/query/", "/q/"),
    (r"/key/", "/k/"),
    (r"/value/", "/v/"),
    (r"/out/", "/proj_out/"),
    (r"/projection/", "/proj/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
)
_BATCH_NORM_NAMES = dict(scale="weight", bias="bias", mean="running_mean", var="running_var")
_ACT_NORM_NAMES = dict(scale="scale", bias="loc")


def _generator_tensors(config: ConfigDict) -> dict[str, _Tensor]:
    """Names and shapes of the reference's tokenizer, from an abstract run of our module."""
    model = config.model.copy_and_resolve_references().to_dict()
    gumbel = model["quantizer"]["kind"] == "gumbel"
    model["quantizer"]["kind"] = "gumbel" if gumbel else "nearest"
    module = VQGAN.from_config(model, jnp.float32)
    shape = (1, model["resolution"], model["resolution"], model["in_channels"])
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = _abstract_variables(module, images)
    tensors = {}
    for path, leaf in flatten_dict(variables).items():
        name = "/".join(path[1:])
        for pattern, replacement in _GENERATOR_NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub("codebook$", "embed.weight" if gumbel else "embedding.weight", name)
        tensors[name] = _tensor(leaf.shape, path)
    return tensors


def _discriminator_tensors(config: ConfigDict) -> dict[str, _Tensor]:
    """Names and shapes of the reference's discriminator: one list of all its layers."""
    options = config.discriminator
    module = PatchDiscriminator(options.channels, options.num_layers, options.norm)
    images = jax.ShapeDtypeStruct((1, 256, 256, config.model.out_channels), jnp.float32)
    tensors = {}
    for path, leaf in flatten_dict(_abstract_variables(module, images)).items():
        layer, index = path[1].split("_")
        index = int(index)
        if layer == "conv":
            position = max(0, 3 * index - 1)  # the list holds norms and activations too
            name = {"kernel": "weight", "bias": "bias"}[path[2]]
            tensor = _tensor(leaf.shape, path)
        elif options.norm == "batch":
            position, name = 3 * index, _BATCH_NORM_NAMES[path[2]]
            tensor = _tensor(leaf.shape, path)
        else:
            position, name = 3 * index, _ACT_NORM_NAMES[path[2]]
            tensor = _Tensor((1, *leaf.shape, 1, 1), path, "channels")
        tensors[f"{_DISCRIMINATOR}main.{position}.{name}"] = tensor
    return tensors


def _abstract_variables(module, images):
    return jax.eval_shape(module.init, jax.random.key(0), images)


def _tensor(shape: tuple[int, ...], path: tuple[str, ...]) -> _Tensor:
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return _Tensor((outputs, inputs, height, width), path, "convolution")
    return _Tensor(shape, path)


ROOTS = ("encoder.", "decoder.")  # of a tokenizer's names


def state_dict_of(checkpoint: Mapping) -> dict[str, np.ndarray]:
    """The state dict of a tokenizer's checkpoint, unwrapped as of `wrappers.unwrap`.

    Raises:
      ConversionError: it holds none, or that of a transformer.
    """
    tensors, _ = unwrap(checkpoint, ROOTS)
    if any(name.startswith(("transformer.", "first_stage_model.")) for name in tensors):
        raise ConversionError(
            "The yaml describes a tokenizer and the checkpoint is a transformer's: it takes the "
            "yaml whose model.target is Net2NetTransformer."
        )
    if not any(name.startswith(ROOTS) for name in tensors):
        raise ConversionError(
            "The checkpoint holds no tokenizer: it has no tensors encoder.* and decoder.*; "
            f"it has {some(map(str, tensors or checkpoint))}."
        )
    return tensors


def variables_from_state_dict(
    state_dict: Mapping[str, np.ndarray], config: ConfigDict
) -> tuple[dict, Report]:
    """The variables of `VQGAN` from the state dict of a VQModel, GumbelVQ or VQSegmentationModel.

    Args:
      state_dict: tensors by the reference's names, of any floating type.
      config: a full config, as `config_from_yaml` makes it.

    Returns:
      `{"params": ...}` in float32, and what was found. The training's networks are not in it: see
      `discriminator_from_state_dict`.

    Raises:
      ConversionError: tensors are missing, unexpected, of another shape, or not finite.
    """
    tensors = _generator_tensors(config)
    _check_sizes(state_dict, config)
    own = {}
    left_out = {}
    for name, value in state_dict.items():
        group = re.match(r"loss(\.[a-z_]+)?|colorize$", name)
        if group:
            left_out[group[0]] = left_out.get(group[0], 0) + 1
        else:
            own[name] = value
    variables = _convert(own, tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    quantizer = config.model.quantizer
    codebook = (quantizer.codebook_size, quantizer.code_dim)
    return variables, Report(reference_class(config), parameters, codebook, left_out)


def discriminator_from_state_dict(
    state_dict: Mapping[str, np.ndarray], config: ConfigDict
) -> dict | None:
    """The variables of `PatchDiscriminator`, or None: not in the state dict, or not in the config.

    Raises:
      ConversionError: as for `variables_from_state_dict`.
    """
    own = {
        name: value
        for name, value in state_dict.items()
        if name.startswith(_DISCRIMINATOR)
        and not name.endswith((".num_batches_tracked", ".initialized"))
    }
    if not own or not config.discriminator.enabled:
        return None
    return _convert(own, _discriminator_tensors(config))


def state_dict_from_variables(
    variables: Mapping, config: ConfigDict, discriminator: Mapping | None = None
) -> dict[str, np.ndarray]:
    """The reference's state dict: the inverse of the two functions above.

    A codebook kept as a moving average becomes a plain one. With `l2_normalize` the codebook is
    written at unit length: the nearest code is then the one of the largest cosine, so the
    reference finds the same codes.

    Args:
      variables: those of `VQGAN`, with the collection "codebook" where the quantizer has one.
      config: its config.
      discriminator: the variables of `PatchDiscriminator`; left out if None.

    Raises:
      ConversionError: the variables are not those of the config's model, or the reference has no
        such discriminator.
    """
    name = reference_class(config)
    params = dict(variables["params"])
    quantizer = config.model.quantizer
    if quantizer.kind == "ema":
        codebook = variables["codebook"]["quantize"]["embedding"]
        params["quantize"] = {"codebook": codebook}
    if quantizer.l2_normalize and quantizer.kind != "gumbel":
        params["quantize"] = {"codebook": l2_normalize(params["quantize"]["codebook"])}
    state_dict = _convert_back({"params": params}, _generator_tensors(config))
    if name == "VQSegmentationModel":  # random there too: colours of pictures
        shape = (3, config.data.num_labels, 1, 1)
        state_dict["colorize"] = np.random.default_rng(0).standard_normal(shape, np.float32)
    if discriminator is not None:
        if config.discriminator.norm == "group":
            raise ConversionError(
                "The reference has no discriminator with GroupNorm (config.discriminator.norm)."
            )
        state_dict |= _convert_back(discriminator, _discriminator_tensors(config))
        for index in range(1, config.discriminator.num_layers + 1):
            layer = f"{_DISCRIMINATOR}main.{3 * index}"
            if config.discriminator.norm == "batch":  # a counter that nothing reads
                state_dict[f"{layer}.num_batches_tracked"] = np.array(0, np.int64)
            else:
                state_dict[f"{layer}.initialized"] = np.array(1, np.uint8)
    return state_dict


def _check_sizes(state_dict: Mapping[str, np.ndarray], config: ConfigDict) -> None:
    """Names the yaml's key where one wrong number would make many tensors wrong."""
    model, quantizer = config.model, config.model.quantizer
    gumbel = "quantize.proj.weight" in state_dict
    if gumbel != (quantizer.kind == "gumbel"):
        raise ConversionError(
            f"The yaml describes a {reference_class(config)} and the checkpoint is a "
            f"{'GumbelVQ' if gumbel else 'VQModel'}: they do not belong together."
        )
    if "quantize.used" in state_dict:
        raise ConversionError("The checkpoint's codebook is remapped (quantize.used): unsupported.")
    codebook = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    for name, axis, expected, key in (
        (codebook, 0, quantizer.codebook_size, "n_embed"),
        (codebook, 1, quantizer.code_dim, "embed_dim"),
        ("encoder.conv_in.weight", 0, model.channels, "ddconfig.ch"),
        ("encoder.conv_in.weight", 1, model.in_channels, "ddconfig.in_channels"),
        ("encoder.conv_out.weight", 0, model.latent_channels, "ddconfig.z_channels"),
        ("decoder.conv_out.weight", 0, model.out_channels, "ddconfig.out_ch"),
    ):
        shape = np.shape(state_dict[name]) if name in state_dict else ()
        if axis < len(shape) and shape[axis] != expected:
            raise ConversionError(
                f"The yaml says {key} is {expected}, and the checkpoint's {name} has shape "
                f"{shape}: {key} must be {shape[axis]}, or the two do not belong together."
            )


def _convert(state_dict: Mapping[str, np.ndarray], tensors: dict[str, _Tensor]) -> dict:
    found = {name: np.shape(value) for name, value in state_dict.items()}
    check_shapes(found, {name: tensor.shape for name, tensor in tensors.items()})
    check_floating(state_dict)
    ours = {tensor.path: tensor.ours(state_dict[name]) for name, tensor in tensors.items()}
    check_finite({".".join(path): value for path, value in ours.items()})
    return unflatten_dict(ours)


def _convert_back(variables: Mapping, tensors: dict[str, _Tensor]) -> dict[str, np.ndarray]:
    leaves = flatten_dict(variables)
    names = {tensor.path: name for name, tensor in tensors.items()}
    theirs_shapes = {}
    for path, leaf in leaves.items():
        shape = np.shape(leaf)
        tensor = tensors.get(names.get(path, ""))
        channels = tensor is not None and tensor.layout == "channels"
        theirs_shapes[names.get(path, "/".join(path))] = (
            (1, *shape, 1, 1) if channels else _tensor(shape, path).shape
        )
    check_shapes(theirs_shapes, {name: tensor.shape for name, tensor in tensors.items()})
    return {name: tensor.theirs(leaves[tensor.path]) for name, tensor in tensors.items()}


def check_floating(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `ConversionError` where weights are no floating-point numbers, naming them."""
    broken = [
        f"{name} {value.dtype}"
        for name, value in arrays.items()
        if not jnp.issubdtype(value.dtype, jnp.floating)
    ]
    if broken:
        raise ConversionError(
            f"{len(broken)} tensors are no floating-point numbers ({some(broken)}): take the "
            "checkpoint from before they were quantized to integers."
        )


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `ConversionError` where weights are not numbers, naming them."""
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        raise ConversionError(
            f"{len(broken)} tensors hold values that are not finite ({some(broken)}): the "
            "training had failed; take an earlier checkpoint."
        )


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `ConversionError` unless names and shapes are the same, naming those that differ."""
    missing = [f"{name} {expected[name]}" for name in expected if name not in found]
    unexpected = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ConversionError(
            f"The weights do not fit the config: tensors are {'; '.join(problems)}."
        )
