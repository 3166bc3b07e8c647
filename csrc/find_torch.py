"""Where setup.py finds the torch to compile against: read from disk, never imported or downloaded.

pip hides the environment's packages from a build, but runs the environment's own interpreter. uv
and `build` run an interpreter of their own, and uv changes VIRTUAL_ENV besides, so their command
line and their environment are read (on Linux; elsewhere an environment has to be active, or to be
./.venv). The first of these that has a torch is taken:

    1. what the build itself can import: --no-build-isolation, or torch as a build requirement
    2. the interpreter of the build: pip
    3. what the front end was asked for: uv's --python, UV_PYTHON or --system
    4. the environment that the front end runs in: /path/venv/bin/python -m build
    5. the active environment (VIRTUAL_ENV, CONDA_PREFIX), then .venv in the working directory or
       above and beside the sources; the other way round for uv sync, uv run and uv add
    6. every python3 on the PATH, and the Python that environments were made from

The compiled ops fit every torch of the stable ABI, so that one from a later line will do as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# What pip's isolation sets for its own interpreter.
ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")


class FrontEnd(NamedTuple):
    """The process that called the build: pip, uv, build, or a shell."""

    arguments: list[str]
    variables: dict[str, str]
    folder: Path


def front_end() -> FrontEnd:
    """The process above this one, as far as the system tells."""
    process = Path(f"/proc/{os.getppid()}")
    try:
        words = (process / "cmdline").read_text(errors="replace").split("\0")
        lines = (process / "environ").read_text(errors="replace").split("\0")
        folder = (process / "cwd").readlink()
    except OSError:  # not on Linux, or not ours to read
        return FrontEnd([], dict(os.environ), Path(os.environ.get("PWD") or os.getcwd()))
    return FrontEnd(words, dict(line.split("=", 1) for line in lines if "=" in line), folder)


def interpreters(caller: FrontEnd) -> Iterator[Path]:
    """Pythons of lines 2 to 6 above, in that order; some may not exist."""
    arguments, variables, folder = caller
    base = Path(sys.base_prefix, "bin/python3")
    yield Path(sys.executable)
    asked = [value for option, value in pairwise(arguments) if option in ("-p", "--python")]
    asked += [word.removeprefix("--python=") for word in arguments if word.startswith("--python=")]
    for name in filter(None, (*asked, variables.get("UV_PYTHON"))):
        # An interpreter, an environment, or a name on the PATH. A version is none of them.
        yield Path(shutil.which(name, path=variables.get("PATH")) or folder / name)
        yield folder / name / "bin/python3"
    if "--system" in arguments:
        yield base
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/")
    yield from (parent / "bin/python3" for parent in script.parents)
    keys = ("VIRTUAL_ENV", "CONDA_PREFIX")
    active = [source.get(key, "") for source in (variables, os.environ) for key in keys]
    own = variables.get("UV_PROJECT_ENVIRONMENT") or ".venv"
    nearby = [str(parent / own) for parent in (folder, *folder.parents, ROOT)]
    is_project = {"sync", "run", "add"} & set(arguments) and "--active" not in arguments
    for home in filter(None, (*nearby, *active) if is_project else (*active, *nearby)):
        yield folder / home / "bin/python3"
    yield from (Path(home, "python3") for home in os.get_exec_path())
    yield base


def torch_of(interpreter: Path) -> Path | None:
    """The folder of the torch that another interpreter would import."""
    script = "from importlib.util import find_spec; print(find_spec('torch').origin)"
    clean = {name: value for name, value in os.environ.items() if name not in ISOLATION}
    command = [str(interpreter), "-c", script]
    try:
        done = subprocess.run(
            command, env=clean, cwd="/", capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(done.stdout.strip()).parent


def find_torch() -> tuple[Path, str, str | None] | None:
    """Folder, version and CUDA version of the first torch in the list above."""
    spec = find_spec("torch")
    here = [Path(spec.origin).parent] if spec and spec.origin else []
    others = dict.fromkeys(path for path in interpreters(front_end()) if path.is_file())
    for folder in chain(here, map(torch_of, others)):
        if folder and (folder / "version.py").is_file() and (folder / "include").is_dir():
            found: dict = {}
            exec((folder / "version.py").read_text(), found)
            return folder, str(found["__version__"]), found.get("cuda")
    return None
