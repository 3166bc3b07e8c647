"""Optional packages: a missing one is named at the start, with the extra that installs it."""

from __future__ import annotations

from importlib.util import find_spec


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
