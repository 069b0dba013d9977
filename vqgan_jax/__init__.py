"""Image tokenizers (VQGAN) and autoregressive transformers over their codes, in JAX and Flax."""

__version__ = "0.1.0"


def __getattr__(name):
    # Loaded on first use: `import vqgan_jax` alone stays quick and starts no device.
    if name in ("load", "Tokenizer"):
        from vqgan_jax import inference

        return getattr(inference, name)
    if name == "Generator":
        from vqgan_jax import generation

        return generation.Generator
    raise AttributeError(f"module 'vqgan_jax' has no attribute {name!r}")
