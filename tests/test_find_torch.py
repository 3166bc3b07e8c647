"""The order in which a build looks for torch, in environments that only answer where theirs is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "csrc" / "find_torch.py"
NO_MAIN = "/no/such/folder/script.py"


@pytest.fixture
def finder(tmp_path, monkeypatch):
    """The module, in a process without torch: neither its interpreter nor the PATH has one."""
    spec = importlib.util.spec_from_file_location("find_torch", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "ROOT", tmp_path / "sources")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "build_env" / "bin" / "python3"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", NO_MAIN, raising=False)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "on_path" / "bin"))
    return module


@pytest.fixture
def work(tmp_path):
    """The working directory of the front end."""
    folder = tmp_path / "work" / "deep"
    folder.mkdir(parents=True)
    return folder


def environment(folder, version="2.13.0+cpu", cuda=None):
    """An environment whose python3 only says where its torch is. None: it has no torch."""
    python = folder / "bin" / "python3"
    python.parent.mkdir(parents=True)
    origin = folder / "site-packages" / "torch" / "__init__.py"
    python.write_text(f"#!/bin/sh\necho {origin}\n" if version else "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    if version:
        (origin.parent / "include").mkdir(parents=True)
        text = f"__version__ = {version!r}\ncuda = {cuda!r}\n"
        (origin.parent / "version.py").write_text(text)
    return folder


def found_by(finder, monkeypatch, arguments="", variables=None, folder=Path("/")):
    """The name of the environment that is taken for a front end; None without any."""
    caller = finder.FrontEnd(arguments.split(), variables or {}, folder)
    monkeypatch.setattr(finder, "front_end", lambda: caller)
    found = finder.find_torch()
    return found and found[0].parents[1].name


def test_what_is_read_of_a_torch(finder, monkeypatch, tmp_path):
    home = environment(tmp_path / "base", "2.14.1+cu130", "13.0")
    monkeypatch.setattr(finder, "front_end", lambda: finder.FrontEnd([], {}, tmp_path))
    assert finder.find_torch() == (home / "site-packages" / "torch", "2.14.1+cu130", "13.0")


def test_no_torch_anywhere(finder, monkeypatch, tmp_path, work):
    environment(tmp_path / "base", None)
    environment(tmp_path / "active", None)
    variables = {"VIRTUAL_ENV": str(tmp_path / "active"), "UV_PYTHON": "3.12"}
    asked = "uv pip install --python python3.11 -p"
    assert found_by(finder, monkeypatch, asked, variables, work) is None


def test_each_place_comes_before_the_next(finder, monkeypatch, tmp_path, work):
    """The whole list: what is asked, the front end's, the active, .venv, PATH, the base Python."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "runs/lib/hook.py"))
    places = ("build_env", "asked", "runs", "venv", "conda", "work", "sources", "on_path", "base")
    homes = {name: tmp_path / name for name in places}
    homes |= {name: homes[name] / ".venv" for name in ("work", "sources")}
    variables = {"VIRTUAL_ENV": str(homes["venv"]), "CONDA_PREFIX": str(homes["conda"])}
    for name in reversed(places):  # one after the other, the most likely last
        environment(homes[name])
        arguments = f"uv pip install --python {homes['asked']}/bin/python3 ."
        found = found_by(finder, monkeypatch, arguments, variables, work)
        assert found == homes[name].name


@pytest.mark.parametrize(
    "arguments",
    [
        "uv pip install --python HOME/bin/python3 .",
        "uv pip install --python=HOME/bin/python3 .",
        "uv pip install -p HOME .",
        "uv build -p ../asked",
        "uv pip install --python named .",
        "uv sync --python HOME",
    ],
)
def test_the_ways_of_asking_for_an_interpreter(finder, monkeypatch, tmp_path, arguments, work):
    home = environment(tmp_path / "work" / "asked")
    environment(tmp_path / "active")
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "named").symlink_to(home / "bin" / "python3")
    variables = {"VIRTUAL_ENV": str(tmp_path / "active"), "PATH": str(tmp_path / "commands")}
    arguments = arguments.replace("HOME", str(home))
    assert found_by(finder, monkeypatch, arguments, variables, work) == "asked"
    variables["UV_PYTHON"] = str(home)
    assert found_by(finder, monkeypatch, "uv pip install .", variables, work) == "asked"


def test_system_means_the_python_below_all_environments(finder, monkeypatch, tmp_path):
    environment(tmp_path / "base")
    variables = {"VIRTUAL_ENV": str(environment(tmp_path / "active"))}
    assert found_by(finder, monkeypatch, "uv pip install --system .", variables) == "base"
    assert found_by(finder, monkeypatch, "uv pip install .", variables) == "active"


def test_a_project_of_uv_has_an_environment_of_its_own(finder, monkeypatch, tmp_path, work):
    environment(tmp_path / "work" / ".venv")
    environment(tmp_path / "work" / "elsewhere")
    variables = {"VIRTUAL_ENV": str(environment(tmp_path / "active"))}

    def found(arguments, **more):
        return found_by(finder, monkeypatch, arguments, {**variables, **more}, work)

    assert found("uv pip install .") == "active"
    assert found("uv sync") == found("uv run cppo info") == found("uv add ./cppo") == ".venv"
    assert found("uv sync --active") == "active"
    assert found("uv sync", UV_PROJECT_ENVIRONMENT="elsewhere") == "elsewhere"


def test_a_torch_without_headers_is_passed_over(finder, monkeypatch, tmp_path):
    home = environment(tmp_path / "active")
    (home / "site-packages" / "torch" / "include").rmdir()
    environment(tmp_path / "base")
    assert found_by(finder, monkeypatch, "", {"VIRTUAL_ENV": str(home)}) == "base"


def test_isolation_is_taken_off_the_interpreter_that_is_asked(finder, monkeypatch, tmp_path):
    """pip hides an environment from its own interpreter by PYTHONPATH and PYTHONNOUSERSITE."""
    site = tmp_path / "site"
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    environment(tmp_path / "fake")
    script = f'#!/bin/sh\nPYTHONPATH=$PYTHONPATH:{site} exec {finder.sys._base_executable} "$@"\n'
    (tmp_path / "fake" / "bin" / "python3").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "overlay"))
    (tmp_path / "overlay" / "torch").mkdir(parents=True)
    (tmp_path / "overlay" / "torch" / "__init__.py").write_text("")
    assert finder.torch_of(tmp_path / "fake" / "bin" / "python3") == site / "torch"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_a_front_end_is_read_although_it_hides_its_environment(tmp_path):
    """As uv does: the build is a child with another VIRTUAL_ENV and another working directory."""
    ask = (
        f"import json, runpy; caller = runpy.run_path({str(PATH)!r})['front_end']();"
        "print(json.dumps([caller.arguments, caller.variables['VIRTUAL_ENV'], str(caller.folder)]))"
    )
    call = (
        "import os, subprocess, sys\n"
        "changed = {**os.environ, 'VIRTUAL_ENV': '/build/env'}\n"
        f"subprocess.run([sys.executable, '-c', {ask!r}], env=changed, cwd='/', check=True)\n"
    )
    command = [sys.executable, "-c", call, "pip", "install", "--python", "a folder/env"]
    clean = {**os.environ, "VIRTUAL_ENV": "/the/user's"}
    done = subprocess.run(
        command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    arguments, active, folder = json.loads(done.stdout)
    assert arguments[3:7] == ["pip", "install", "--python", "a folder/env"]
    assert active == "/the/user's" and folder == str(tmp_path)
