"""The PyTorch reference (CompVis/taming-transformers) as something to time beside ours.

It comes from the packages `torch` and `taming-transformers-rom1504` (with `omegaconf`, `tqdm` and
`einops`). What it imports only for its own training loop, to download weights, or from another
library (PyTorch Lightning, torchvision, one filter of transformers) is stood in for: VGG16 is built
here, with random weights.
"""

import contextlib
import importlib
import io
import sys
import types

import numpy as np

VGG16_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
PACKAGES = "torch taming-transformers-rom1504 omegaconf tqdm einops"


class MissingPackages(ImportError):
    """The reference is not installed."""


class TamingReference:
    """A VQModel of the reference with its two optimisers, in training as Lightning drives it.

    Args:
        model: `config.model`, whose networks it gets.
        state_dict: the tokenizer's and the discriminator's weights, by the reference's names.
        images: `(B, H, W, 3)` in [-1, 1], what every call works on.
        learning_rate: of both Adams.

    Raises:
        MissingPackages: a package that it needs is not installed.
    """

    def __init__(self, model, state_dict, images: np.ndarray, learning_rate: float):
        self.torch, vqgan = _import_reference()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = vqgan.VQModel(
                ddconfig={
                    "double_z": False,
                    "z_channels": model.latent_channels,
                    "resolution": model.resolution,
                    "in_channels": model.in_channels,
                    "out_ch": model.out_channels,
                    "ch": model.channels,
                    "ch_mult": model.channel_multipliers,
                    "num_res_blocks": model.num_res_blocks,
                    "attn_resolutions": model.attention_resolutions,
                    "dropout": 0.0,
                },
                lossconfig={
                    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
                    "params": {"disc_start": 0, "disc_weight": 0.8},
                },
                n_embed=model.quantizer.codebook_size,
                embed_dim=model.quantizer.code_dim,
            )
        tensors = {name: self.torch.tensor(value) for name, value in state_dict.items()}
        self.model.load_state_dict(tensors, strict=False)
        self.model.train()
        self.model.learning_rate = learning_rate
        self.optimizers, _ = self.model.configure_optimizers()
        self.images = self.torch.tensor(np.moveaxis(images, -1, 1).copy())
        with self.torch.no_grad():
            self.codes = self.model.encode(self.images)[2][2]
        factor = 2 ** (len(model.channel_multipliers) - 1)
        size = model.resolution // factor
        self.code_shape = (len(images), size, size, model.quantizer.code_dim)

    def train(self) -> None:
        """One step of both players; each half runs with the other player's gradients off."""
        for index, optimizer in enumerate(self.optimizers):
            for parameter in self.model.parameters():
                parameter.requires_grad = False
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad = True
            reconstructions, codebook_loss = self.model(self.images)
            loss, _ = self.model.loss(
                codebook_loss,
                self.images,
                reconstructions,
                index,
                1,  # the step: the adversarial game is on
                last_layer=self.model.get_last_layer(),
                split="train",
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def encode(self) -> None:
        """Images to codes."""
        with self.torch.inference_mode():
            self.model.encode(self.images)

    def decode(self) -> None:
        """Codes to images."""
        with self.torch.inference_mode():
            vectors = self.model.quantize.get_codebook_entry(self.codes, self.code_shape)
            self.model.decode(vectors)


class TamingTransformer:
    """The reference's GPT with given weights.

    Args:
        shape: its `vocab_size`, `block_size`, `n_layer`, `n_head` and `n_embd`.
        state_dict: tensors `transformer.*` by its names, NumPy arrays.
        codes: `(B, N)`, what a training step works on, behind start token 0.
        top_k: of sampling.

    Raises:
        MissingPackages: a package that it needs is not installed.
    """

    def __init__(self, shape: dict, state_dict, codes: np.ndarray, top_k: int):
        self.torch = _import_torch()
        transformers = types.ModuleType("transformers")
        transformers.top_k_top_p_filtering = self._filter
        sys.modules.setdefault("transformers", transformers)
        self.mingpt = importlib.import_module("taming.modules.transformer.mingpt")
        self.model = self.mingpt.GPT(**shape)
        tensors = {
            name.removeprefix("transformer."): self.torch.tensor(value)
            for name, value in state_dict.items()
        }
        self.model.load_state_dict(tensors, strict=False)
        self.model.train()
        self.optimizer = self.torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01
        )
        codes = self.torch.tensor(codes, dtype=self.torch.long)
        self.start = self.torch.zeros((len(codes), 1), dtype=self.torch.long)
        self.tokens, self.targets = self.torch.cat([self.start, codes[:, :-1]], 1), codes
        self.top_k = top_k

    def _filter(self, logits, top_k, top_p):
        del top_p
        smallest = self.torch.topk(logits, top_k)[0][..., -1, None]
        return logits.masked_fill(logits < smallest, -float("inf"))

    def train(self) -> None:
        """One update."""
        self.model.train()
        logits, _ = self.model(self.tokens)
        loss = self.torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), self.targets.reshape(-1)
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def sample(self) -> None:
        """All codes of each row, with the reference's cache."""
        self.model.eval()
        with self.torch.inference_mode():
            self.mingpt.sample_with_past(
                self.start, self.model, steps=self.targets.shape[1], top_k=self.top_k
            )


def _import_torch():
    """PyTorch, with all packages of the reference there."""
    try:
        torch = importlib.import_module("torch")
        for name in ("taming", "omegaconf", "tqdm", "einops"):
            importlib.import_module(name)
    except ImportError as error:
        raise MissingPackages(
            f"--peer needs {error.name}, which is not installed: pip install {PACKAGES}"
        ) from None
    return torch


def _import_reference():
    """PyTorch and the reference's module of models, its other imports stood in for."""
    torch = _import_torch()

    def vgg16(pretrained: bool = False):
        del pretrained
        layers, channels = [], 3
        for width in VGG16_LAYERS:
            if width == "M":
                layers.append(torch.nn.MaxPool2d(2, 2))
            else:
                layers.append(torch.nn.Conv2d(channels, width, 3, padding=1))
                layers.append(torch.nn.ReLU(inplace=True))
                channels = width
        for layer in layers:
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return types.SimpleNamespace(features=torch.nn.Sequential(*layers))

    def instantiate_from_config(config):
        module, name = config["target"].rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(**config.get("params", {}))

    models = types.ModuleType("torchvision.models")
    models.vgg16 = vgg16
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = torch.nn.Module
    main = types.ModuleType("taming.main")
    main.instantiate_from_config = instantiate_from_config
    for module in (models, torchvision, lightning, main):
        sys.modules.setdefault(module.__name__, module)
    lpips = importlib.import_module("taming.modules.losses.lpips")
    lpips.LPIPS.load_from_pretrained = lambda self: None
    return torch, importlib.import_module("taming.models.vqgan")
