"""Image tokenizers (VQGAN) and autoregressive transformers over their codes, in JAX and Flax."""

import os
import signal
import sys

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


def _interrupted(_number, _frame):
    """Ctrl-C while a command imports what it needs: nothing is begun, and nobody else would end it.

    An exception could come to be raised where it is ignored, as in a callback of the collector.
    """
    print("Interrupted.", file=sys.stderr, flush=True)
    os._exit(130)


# python -m vqgan_jax, python -m vqgan_jax.NAME, and the program vqgan-jax
if any(f"{part}.".startswith("vqgan_jax.") for part in sys.orig_argv[1:4]) or (
    os.path.basename((sys.argv or [""])[0]) == "vqgan-jax"
):
    signal.signal(signal.SIGINT, _interrupted)  # until `command_line.run` takes over
