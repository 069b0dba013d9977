"""Image tokenizers (VQGAN) and autoregressive transformers over their codes, in JAX and Flax."""

__version__ = "0.1.0"
