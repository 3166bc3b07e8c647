"""Build of the compiled extension; everything else about the package is in pyproject.toml.

    cppo._C      tensor ops on the CPU, against LibTorch's stable ABI (one binary, torch 2.11-2.15)
    cppo._cuda   their CUDA kernels, same ABI
    cppo._host   planners that see no tensor, bound with pybind11

Environment: CPPO_SKIP_BUILD=1 builds nothing, CPPO_FORCE_BUILD=1 makes a missing or failing build
an error, CPPO_FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST asks for CUDA, MAX_JOBS limits the compilers.
No GPU is ever queried, and torch is located and read, never imported and never downloaded.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STABLE_ABI_VERSION = (2, 11)
DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0")
CPU_SOURCES = (
    "csrc/cppo.cpp",
    "csrc/cpu/advantages_and_prune.cpp",
    "csrc/cpu/cppo_loss.cpp",
    "csrc/cpu/head.cpp",
    "csrc/cpu/kept_memory.cpp",
    "csrc/cpu/loss_terms.cpp",
    "csrc/cpu/pack_completions.cpp",
    "csrc/cpu/perception_mask.cpp",
    "csrc/cpu/row_kernels.cpp",
    "csrc/cpu/row_kernels_avx2.cpp",
    "csrc/cpu/row_kernels_avx512.cpp",
    "csrc/cpu/row_kernels_default.cpp",
    "csrc/cpu/rows.cpp",
    "csrc/cpu/token_stats.cpp",
)
CUDA_SOURCES = ("csrc/cuda/advantages_and_prune.cu", "csrc/cuda/pack_completions.cu")
CUDA_TABLE = "csrc/cuda/cuda.cpp"
# No contraction: the CPU and the CUDA kernel round alike.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
# The row kernels choose their instruction set at run time, and want multiply-adds contracted.
# -fwrapv, one of Python's own flags, would cost their innermost loops a tenth more instructions.
ROW_KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-wrapv"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# With 32 registers instructions may be ordered before registers are given out: 3 % of a row's time.
# GCC's own flags, left out for other compilers.
GCC_FLAGS = ("-fschedule-insns", "-fsched-pressure")
X86 = platform.machine() in ("x86_64", "AMD64")
SOURCE_FLAGS = {
    "csrc/cpu/row_kernels_default.cpp": ROW_KERNEL_FLAGS,
    "csrc/cpu/row_kernels_avx2.cpp": ROW_KERNEL_FLAGS + (AVX2_FLAGS if X86 else []),
    "csrc/cpu/row_kernels_avx512.cpp": ROW_KERNEL_FLAGS + (AVX512_FLAGS if X86 else []),
}
HOST_SOURCES = ("csrc/host/planners.cpp",)


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def find_torch() -> tuple[Path, str, str | None] | None:
    """Folder, version and CUDA version of the installed torch, without importing it.

    Under pip's build isolation sys.path hides the environment's site-packages, but the interpreter,
    and with it sysconfig's paths, is still the environment's.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if os.environ.get("VIRTUAL_ENV"):
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        folders.append(f"{os.environ['VIRTUAL_ENV']}/lib/{version}/site-packages")
    spec = find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(folder) / "torch" for folder in folders]
    for folder in candidates:
        if (folder / "version.py").exists() and (folder / "include").is_dir():
            found: dict = {}
            exec((folder / "version.py").read_text(), found)
            return folder, str(found["__version__"]), found.get("cuda")
    return None


def first_line(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    lines = run.stdout.strip().splitlines()
    # nvcc opens with a banner; its version is on a later line.
    return next((line for line in lines if "release" in line), "".join(lines[:1]))


def cxx() -> str:
    """The C++ compiler that setuptools would call, or '' when there is none."""
    name = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    for candidate in (shlex.split(name)[0], "c++", "g++", "clang++"):
        if shutil.which(candidate):
            return candidate
    return ""


def source_flags(source: str) -> list[str]:
    """The flags of one file, for the compiler that is here."""
    flags = SOURCE_FLAGS.get(source, [])
    is_gcc = "clang" not in first_line([cxx(), "--version"]).lower()
    return [*flags, *GCC_FLAGS] if is_gcc and "-mavx512f" in flags else flags


def cuda_archs(nvcc: str) -> list[str]:
    """Real architectures as nvcc names them (80, 90), from TORCH_CUDA_ARCH_LIST or the default."""
    asked = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    asked = [arch.removesuffix("+PTX") for arch in asked if re.match(r"\d+\.\d", arch)]
    archs = [arch.replace(".", "") for arch in asked or DEFAULT_CUDA_ARCHS]
    if asked:
        return archs
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in archs if f"compute_{arch}" in known.split()]


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.access(f"{home}/bin/nvcc", os.X_OK):
            return f"{home}/bin/nvcc"
    return shutil.which("nvcc")


def pybind11_include() -> str | None:
    try:
        import pybind11
    except ImportError:
        return None
    return str(pybind11.get_include())


def plan() -> tuple[list[Extension], dict]:
    """The extensions to build here and the record that becomes cppo/build_info.json."""
    compiler, torch, nvcc = cxx(), find_torch(), find_nvcc()
    info: dict = {"python": sys.version.split()[0], "torch": torch and torch[1], "cuda_archs": []}
    info["compiler"] = first_line([compiler, "--version"]) if compiler else ""
    why_not = ""
    if flag("CPPO_SKIP_BUILD"):
        why_not = "CPPO_SKIP_BUILD is set"
    elif os.name == "nt":
        why_not = "the extension is not built on Windows"
    elif not compiler:
        why_not = "no C++ compiler was found"
    for part in ("cpp", "cuda", "host"):
        info[part] = why_not
    if why_not:
        return [], info

    extensions = []
    host_include = pybind11_include()
    if host_include:
        extensions.append(
            Extension(
                "cppo._host",
                list(HOST_SOURCES),
                include_dirs=[host_include],
                extra_compile_args=CXX_FLAGS,
                language="c++",
            )
        )
    else:
        info["host"] = "pybind11 is not installed"
    if torch is None:
        info["cpp"] = info["cuda"] = (
            "no installed torch was found: install it, then `pip install --no-build-isolation .`"
        )
        return extensions, info
    folder, version, torch_cuda = torch
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < STABLE_ABI_VERSION:
        info["cpp"] = info["cuda"] = f"torch {version} is older than 2.11"
        return extensions, info

    target = "0x{:02x}{:02x}000000000000".format(*STABLE_ABI_VERSION)
    stable = {
        "include_dirs": ["csrc", str(folder / "include")],
        "library_dirs": [str(folder / "lib")],
        "define_macros": [("TORCH_TARGET_VERSION", target), ("Py_LIMITED_API", "0x030a0000")],
        "extra_compile_args": CXX_FLAGS,
        "language": "c++",
        "py_limited_api": True,
    }
    extensions.append(
        Extension("cppo._C", list(CPU_SOURCES), libraries=["torch_cpu", "torch", "c10"], **stable)
    )
    asked = torch_cuda or flag("CPPO_FORCE_CUDA") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not nvcc:
        info["cuda"] = "nvcc was not found"
    elif not asked:
        info["cuda"] = f"torch {version} is a CPU build and CPPO_FORCE_CUDA is not set"
    else:
        info["cuda_archs"] = cuda_archs(nvcc)
        info["nvcc"] = first_line([nvcc, "--version"])
        stable["define_macros"] = [*stable["define_macros"], ("USE_CUDA", "1")]
        cuda = Extension("cppo._cuda", [CUDA_TABLE], libraries=["torch_cpu", "torch"], **stable)
        cuda.nvcc, cuda.archs = nvcc, info["cuda_archs"]
        # The CPU build of torch has no torch_cuda to link; the kernels still compile and link.
        cuda.libraries += ["torch_cuda"] if (folder / "lib" / "libtorch_cuda.so").exists() else []
        extensions.append(cuda)
    return extensions, info


def record(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build_info.json").write_text(json.dumps(INFO, indent=1) + "\n")


def say(line: str) -> None:
    print(f"cppo: {line}", file=sys.stderr, flush=True)


class BuildPy(build_py):
    """Adds build_info.json, which also exists where nothing is compiled."""

    def run(self) -> None:
        super().run()
        record(ROOT / "cppo" if self.editable_mode else Path(self.build_lib) / "cppo")
        if not any(extension.name == "cppo._C" for extension in EXTENSIONS):
            say(f"pure-Python install, without the compiled tensor ops: {INFO['cpp']}")


class BuildExt(build_ext):
    """Compiles sources in parallel, .cu files with nvcc, and records what became of each part."""

    PARTS = {"cppo._C": "cpp", "cppo._cuda": "cuda", "cppo._host": "host"}

    def build_extension(self, ext: Extension) -> None:
        part = self.PARTS[ext.name]
        try:
            objects = self.compile_objects(ext)
            if part == "cuda":
                self.link_with_nvcc(ext, objects)
            else:
                # What the linked file must not be older than: there are no sources to compare with.
                ext.extra_objects, ext.depends, ext.sources = objects, objects, []
                super().build_extension(ext)
            INFO[part] = ""
        except Exception as error:
            INFO[part] = f"compilation failed: {str(error).splitlines()[0][:200]}"
            say(f"{ext.name} was not built: {INFO[part]}")
            raise

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        super().run()
        record(ROOT / "cppo" if in_place else Path(self.build_lib) / "cppo")

    def compile_objects(self, ext: Extension) -> list[str]:
        cu = list(CUDA_SOURCES) if ext.name == "cppo._cuda" else []
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            waiting = [pool.submit(self.compile_one, ext, source) for source in ext.sources]
            waiting += [pool.submit(self.compile_cu, ext, source) for source in cu]
            return [item.result() for item in waiting]

    def compile_one(self, ext: Extension, source: str) -> str:
        (built,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *source_flags(source)],
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
        )
        return str(built)

    def compile_cu(self, ext: Extension, source: str) -> str:
        built = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
        built.parent.mkdir(parents=True, exist_ok=True)
        options = ["-c", source, "-o", str(built), "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
        options += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        options += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ext.archs]
        options += [f"-I{folder}" for folder in ext.include_dirs]
        options += [
            f"-D{name}" + (f"={value}" if value else "") for name, value in ext.define_macros
        ]
        self.call_nvcc(ext, options)
        return str(built)

    def link_with_nvcc(self, ext: Extension, objects: list[str]) -> None:
        """Links the CUDA runtime statically: its soname differs between CUDA 12 and 13."""
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        options = ["-shared", "-cudart", "static", "-o", target, *objects]
        options += [f"-L{folder}" for folder in ext.library_dirs]
        self.call_nvcc(ext, options + [f"-l{library}" for library in ext.libraries])

    def call_nvcc(self, ext: Extension, options: list[str]) -> None:
        print(shlex.join([ext.nvcc, *options]), flush=True)
        run = subprocess.run([ext.nvcc, *options], capture_output=True, text=True)
        if run.returncode:
            print(run.stdout, run.stderr, flush=True)
            raise RuntimeError(f"nvcc failed: {shlex.join(options[:4])}")


EXTENSIONS, INFO = plan()
if not INFO["cpp"]:
    INFO["cpp"] = "not compiled yet"
elif flag("CPPO_FORCE_BUILD"):
    raise SystemExit(
        f"cppo: CPPO_FORCE_BUILD is set but the extension cannot be built: {INFO['cpp']}"
    )
for extension in EXTENSIONS:
    extension.optional = not flag("CPPO_FORCE_BUILD")

setup(
    # Listed here, not in pyproject.toml, because cppo's packages are found and two are mapped.
    packages=[
        *find_packages(include=["cppo", "cppo.*"]),
        "cppo.triton_kernels",
        "cppo.benchmarks",
    ],
    package_dir={"cppo.triton_kernels": "triton_kernels", "cppo.benchmarks": "benchmarks"},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
