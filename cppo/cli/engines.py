"""What samples the rollouts, in words: for `cppo info`, a dry run and the first lines of a run."""

from __future__ import annotations

import re
from importlib.metadata import requires, version

from cppo.extras import vllm_build
from cppo.options.trainer import CPPOConfig


def support() -> dict[str, str]:
    """What is here of each engine of `CPPOConfig.engine`, or why it is not."""
    return {
        "builtin": "yes",
        "vllm": _vllm(),
        "vllm_server": "any `vllm serve`, at trainer.vllm.address",
    }


def _vllm() -> str:
    build = vllm_build()
    if build is None:
        return "not installed: pip install 'cppo[vllm]'"
    name, own = build
    # Its compiled part fits one release of torch, which its metadata names.
    pins = (re.match(r"torch *== *([\d.]+)", line) for line in requires(name) or ())
    needed = next((pin[1] for pin in pins if pin), None)
    here = version("torch").partition("+")[0]
    if needed not in (None, here):
        return f"{own} ({name}) is for torch {needed}, here is torch {here}"
    return f"{own} ({name})"


def engine_words(config: CPPOConfig) -> str:
    """What samples in a run, such as "vllm 0.32.0 (float32), in this process"."""
    from cppo.train.engine import engine_dtype

    if config.engine == "vllm_server":  # which says with what it was started
        return f"vllm serve at {config.vllm.address}"
    if config.engine == "vllm":
        build = vllm_build()
        name = f"vllm {build[1]}" if build else "vllm"
        return f"{name} ({engine_dtype(config)}), in this process"
    return f"the built-in loop ({engine_dtype(config)})"
