"""What is built and shipped: wheel contents, lean import, and every way a build can go without.

Wheels are built from copies of the sources in a temporary folder, with the pip of this environment.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from cppo.cli import info

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "csrc",
    "triton_kernels",
    "benchmarks",
    "cppo",
)
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
HAS_NVCC = bool(shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists())

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not (HAS_COMPILER and HAS_NVCC), reason="no nvcc")


def run(command, cwd, **env):
    """Runs outside the repository, with the build switches of this environment taken away."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CPPO_")}
    clean.pop("TORCH_CUDA_ARCH_LIST", None)
    return subprocess.run(
        command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=500
    )


def pip_wheel(folder, *options, isolated=False, **env):
    """Builds a wheel from a copy of the sources; returns the process and the wheel or None."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build_info.json")
    copy = folder / "sources"
    for name in (*SOURCES, "README.md"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        elif (ROOT / name).exists():
            copy.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", "-v", "-w", "dist"]
    command += [] if isolated else ["--no-build-isolation"]
    done = run([*command, *options], folder, **env)
    wheels = list((folder / "dist").glob("*.whl"))
    return done, wheels[0] if done.returncode == 0 else None


def said_by_cppo(done):
    lines = (line.strip() for line in (done.stdout + done.stderr).splitlines())
    return [line for line in lines if line.startswith("cppo: ")]


def last_line(done):
    """What the build said last: pip repeats it with an indent, on its standard error."""
    return [line.strip() for line in done.stderr.splitlines() if line.startswith("  ")][-1]


def is_for_any_machine(wheel):
    """Whether nothing compiled is in a wheel; its name, its tag and its contents have to agree."""
    archive = zipfile.ZipFile(wheel)
    libraries = [name for name in archive.namelist() if name.endswith(".so")]
    (tags,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    is_pure = "Tag: py3-none-any" in archive.read(tags).decode().splitlines()
    assert is_pure == wheel.name.endswith("-py3-none-any.whl") == (not libraries)
    return is_pure


def build_info(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("cppo/build_info.json"))


@pytest.fixture(scope="module")
def full_wheel(tmp_path_factory):
    """Everything this machine can compile, CUDA included where there is an nvcc."""
    env = {"CPPO_FORCE_BUILD": "1", **({"CPPO_FORCE_CUDA": "1"} if HAS_NVCC else {})}
    done, wheel = pip_wheel(tmp_path_factory.mktemp("full"), **env)
    assert wheel, done.stdout + done.stderr
    parts = "cpp, cuda, host" if HAS_NVCC else "cpp, host; no cuda: nvcc was not found"
    assert last_line(done) == f"cppo: compiled ops for torch {torch.__version__}: {parts}"
    return wheel


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    done, wheel = pip_wheel(tmp_path_factory.mktemp("pure"), CPPO_SKIP_BUILD="1")
    assert wheel, done.stdout + done.stderr
    said = "cppo: pure-Python install, without the compiled tensor ops: CPPO_SKIP_BUILD is set"
    assert said_by_cppo(done) == [said]
    assert last_line(done) == said
    return wheel


@needs_compiler
def test_a_wheel_with_the_ops_is_named_after_its_python_and_machine(full_wheel):
    assert not is_for_any_machine(full_wheel)
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"  # the planners' pybind11 needs it
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert full_wheel.name.endswith(f"-{python}-{python}-{machine}.whl")


@needs_compiler
def test_wheel_holds_the_package_and_nothing_at_top_level(full_wheel):
    names = zipfile.ZipFile(full_wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cppo"}
    assert {"cppo/triton_kernels/__init__.py", "cppo/_C.abi3.so", "cppo/py.typed"} <= set(names)
    assert {"cppo/benchmarks/cases.py", "cppo/benchmarks/experiments/step.py"} <= set(names)
    assert any(name.startswith("cppo/_host.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = full_wheel.parents[1] / "sources"
    files = list((sources / "cppo").rglob("*.py"))
    for kind in ("*.safetensors", "*.json", "*.jinja"):
        files += (sources / "cppo" / "demo").rglob(kind)
    for folder in ("pages", "inspection", "report"):
        files += [file for file in (sources / "cppo" / folder).glob("*.*") if file.suffix != ".pyc"]
    assert {str(path.relative_to(sources)) for path in files} <= set(names)


@needs_compiler
def test_build_info_records_the_build(full_wheel):
    info = build_info(full_wheel)
    assert info["cpp"] == "" and info["host"] == ""
    assert info["torch"] == torch.__version__ and info["compiler"]
    assert info["cuda_archs"] == (["80", "90", "100"] if HAS_NVCC else [])


def undefined_symbols(wheel, library, folder):
    path = zipfile.ZipFile(wheel).extract(f"cppo/{library}.abi3.so", folder)
    return subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_tensor_ops_use_the_stable_abi_only(full_wheel, tmp_path):
    symbols = undefined_symbols(full_wheel, "_C", tmp_path)
    assert "torch_library_impl" in symbols
    # Mangled names of at:: and c10:: belong to the C++ ABI that changes with every release.
    assert "_ZN2at" not in symbols and "_ZN3c10" not in symbols and "_ZNK3c10" not in symbols


@needs_nvcc
def test_cuda_kernels_compile_against_any_torch(full_wheel, tmp_path):
    symbols = undefined_symbols(full_wheel, "_cuda", tmp_path)
    assert "aoti_torch_get_current_cuda_stream" in symbols
    # The CUDA runtime is inside: its soname differs between CUDA 12 and 13.
    assert "cudaLaunchKernel" not in symbols
    cuobjdump = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    if Path(cuobjdump).exists():
        library = str(tmp_path / "cppo" / "_cuda.abi3.so")
        listed = subprocess.run([cuobjdump, "--list-elf", library], capture_output=True, text=True)
        assert all(f"sm_{arch}" in listed.stdout for arch in (80, 90, 100))


def test_pure_python_wheel_works_and_says_why(pure_wheel, tmp_path):
    assert is_for_any_machine(pure_wheel)
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    script = """
import torch, cppo
from cppo import backends
print(cppo.__file__)
print(cppo.advantages_and_prune(torch.tensor([0.0, 1.0, 1.0, 5.0]), 4, 0.5)[1].tolist())
print(cppo.plan_microbatches([3, 4, 5], 8))
try:
    cppo.group_advantages(torch.zeros(4), 4, backend="cpp")
except RuntimeError as error:
    print(error)
"""
    done = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines() == [
        str(tmp_path / "cppo" / "__init__.py"),
        "[0, 3]",
        "[[0, 2], [1]]",
        "cppo.group_advantages: backend 'cpp' cannot run here: CPPO_SKIP_BUILD is set",
    ], done.stderr


def test_without_a_compiler_the_install_is_pure_python(tmp_path):
    done, wheel = pip_wheel(tmp_path, PATH=str(tmp_path), CXX="")
    assert wheel, done.stdout + done.stderr
    assert said_by_cppo(done) == [
        "cppo: pure-Python install, without the compiled tensor ops: no C++ compiler was found"
    ]
    assert build_info(wheel)["cpp"] == "no C++ compiler was found"
    assert is_for_any_machine(wheel)


def test_force_build_without_a_compiler_is_an_error(tmp_path):
    done, wheel = pip_wheel(tmp_path, PATH=str(tmp_path), CXX="", CPPO_FORCE_BUILD="1")
    assert wheel is None
    reason = "the extension cannot be built: no C++ compiler was found"
    assert f"cppo: CPPO_FORCE_BUILD is set but {reason}" in said_by_cppo(done)


def broken_compiler(folder):
    """A compiler that is there and fails, which also keeps the test fast."""
    path = folder / "c++"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_a_failing_compiler_is_recorded_and_forced_builds_stop(tmp_path):
    compiler = broken_compiler(tmp_path)
    (tmp_path / "soft").mkdir()
    done, wheel = pip_wheel(tmp_path / "soft", CXX=compiler, CC=compiler)
    assert wheel, done.stdout + done.stderr
    reason = build_info(wheel)["cpp"]
    assert reason.startswith("compilation failed")
    assert build_info(wheel)["host"] == reason  # the planners alone would not be worth a tag
    assert is_for_any_machine(wheel)
    words = "cppo: pure-Python install, without the compiled tensor ops"
    assert said_by_cppo(done)[-1] == f"{words}: {reason}"
    (tmp_path / "forced").mkdir()
    done, wheel = pip_wheel(tmp_path / "forced", CXX=compiler, CC=compiler, CPPO_FORCE_BUILD="1")
    assert wheel is None


@needs_compiler
def test_what_was_compiled_again_is_linked_again(tmp_path):
    """Building twice in one folder, as an upgrade does: no binary of the old sources stays."""
    script = """
import runpy, setuptools
setup, options = setuptools.setup, {}
setuptools.setup = options.update
runpy.run_path(SETUP)
toy = setuptools.Extension("cppo._C", ["toy.cpp"], language="c++")
setup(name="toy", ext_modules=[toy], cmdclass=options["cmdclass"])
"""
    (tmp_path / "build_toy.py").write_text(script.replace("SETUP", repr(str(ROOT / "setup.py"))))
    source = tmp_path / "toy.cpp"
    for word in ("before", "after"):
        source.write_text(f'extern "C" const char* toy() {{ return "{word} the change"; }}\n')
        later = source.stat().st_mtime + (60 if word == "after" else -60)
        os.utime(source, (later, later))
        done = run([sys.executable, "build_toy.py", "build_ext"], tmp_path)
        (binary,) = tmp_path.glob("build/lib*/cppo/_C*.so")
        assert f"{word} the change".encode() in binary.read_bytes(), done.stdout + done.stderr


def test_build_isolation_finds_the_installed_torch(tmp_path):
    compiler = broken_compiler(tmp_path)
    done, wheel = pip_wheel(tmp_path, isolated=True, CXX=compiler, CC=compiler)
    said = done.stdout + done.stderr
    if wheel is None and "No matching distribution" in said:
        pytest.skip("pip cannot fetch the build requirements here")
    assert wheel, said
    # Read from the environment that isolation hides; no second torch came along.
    assert build_info(wheel)["torch"] == torch.__version__
    assert "Collecting torch" not in said


def test_importing_cppo_is_lean(tmp_path):
    script = """
import sys, cppo, cppo.cli.info, torch
heavy = {"triton", "transformers", "accelerate", "datasets", "sklearn", "matplotlib", "peft"}
print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())
"""
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.stdout.strip() == "[] False", done.stderr


def test_the_folder_refuses_to_be_a_top_level_package(tmp_path):
    command = [sys.executable, "-c", "import triton_kernels"]
    done = run(command, tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "ImportError: this is cppo.triton_kernels, imported as 'triton_kernels'" in done.stderr


def test_tests_do_not_shadow_the_package_of_triton():
    spec = importlib.util.find_spec("triton_kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_ruff_is_pinned_once():
    """pyproject.toml and the pre-commit hooks check with the same ruff."""
    pinned = [
        line.split('"ruff==')[1].split('"')[0]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if '"ruff==' in line
    ]
    assert f"rev: v{pinned[0]} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_install_page_names_every_extra_and_every_variable_of_the_build():
    toml = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    variables = re.findall(
        r'(?:flag|environ\.get)\("((?:CPPO|MAX|TORCH)_\w+)"', (ROOT / "setup.py").read_text()
    )
    assert len(set(variables)) == 6
    assert not [name for name in project["optional-dependencies"] if f"`{name}`" not in page]
    assert not [name for name in variables if f"| `{name}" not in page]


def test_wheels_are_made_with_the_torch_of_make_setup():
    toml = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    parsed = toml.loads((ROOT / "pyproject.toml").read_text())
    before = parsed["tool"]["cibuildwheel"]["before-build"]
    (torch_of_setup,) = re.findall(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert torch_of_setup in before.split()
    assert not [need for need in parsed["build-system"]["requires"] if need not in before]


def test_info_prints_tables_and_json(capsys):
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    assert "advantages_and_prune" in printed and "stable ABI" in printed
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ops"]["cpu"]["token_stats"]["reference"] == ""
    assert facts["versions"]["torch"] == torch.__version__
