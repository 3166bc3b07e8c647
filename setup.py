"""Build of the compiled extension; everything else about the package is in pyproject.toml.

    cppo._C      tensor ops on the CPU, against LibTorch's stable ABI (one binary, torch 2.11-2.15)
    cppo._cuda   their CUDA kernels, same ABI
    cppo._host   planners that see no tensor, bound with pybind11

A wheel with the tensor ops is named after its Python and machine. Without them nothing compiled
is in it and its name ends in py3-none-any. The last line of every build says which one it is.

Environment: CPPO_SKIP_BUILD=1 builds nothing, CPPO_FORCE_BUILD=1 makes a missing or failing build
an error, CPPO_FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST asks for CUDA, MAX_JOBS limits the compilers.
CPPO_CXXFLAGS goes to the C++ compiler after every flag of ours, and to its link (-O1, or a
sanitizer; tests/run_builds.sh).
No GPU is ever queried, and torch is located and read, never imported and never downloaded.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STABLE_ABI_VERSION = (2, 11)
DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0")
CPU_SOURCES = (
    "csrc/cppo.cpp",
    "csrc/cpu/advantages_and_prune.cpp",
    "csrc/cpu/contrast.cpp",
    "csrc/cpu/loss_terms.cpp",
    "csrc/cpu/pack_completions.cpp",
    "csrc/cpu/perception_mask.cpp",
    "csrc/cpu/row_kernels.cpp",
    "csrc/cpu/row_kernels_avx2.cpp",
    "csrc/cpu/row_kernels_avx512.cpp",
    "csrc/cpu/row_kernels_default.cpp",
    "csrc/cpu/rows.cpp",
    "csrc/cpu/token_stats.cpp",
    "csrc/cpu/unpack.cpp",
)
CUDA_SOURCES = ("csrc/cuda/advantages_and_prune.cu", "csrc/cuda/pack_completions.cu")
CUDA_MODULE = "csrc/cuda/cuda.cpp"
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
# No import: under PEP 517 the folder of setup.py is not on the path.
find_torch = runpy.run_path(str(ROOT / "csrc" / "find_torch.py"))["find_torch"]
PARTS = {"cppo._C": "cpp", "cppo._cuda": "cuda", "cppo._host": "host"}


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


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


def extra_flags() -> list[str]:
    """What the environment adds to the flags of every C++ file."""
    return shlex.split(os.environ.get("CPPO_CXXFLAGS", ""))


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
    elif torch is None:
        why_not = "the build found no installed torch: install torch, then cppo again"
    elif tuple(int(part) for part in re.findall(r"\d+", torch[1])[:2]) < STABLE_ABI_VERSION:
        why_not = f"torch {torch[1]} is older than 2.11"
    for part in ("cpp", "cuda", "host"):
        info[part] = why_not
    if why_not or torch is None:
        return [], info

    folder, version, torch_cuda = torch
    target = "0x{:02x}{:02x}000000000000".format(*STABLE_ABI_VERSION)
    stable = {
        "include_dirs": ["csrc", str(folder / "include")],
        "library_dirs": [str(folder / "lib")],
        "define_macros": [("TORCH_TARGET_VERSION", target), ("Py_LIMITED_API", "0x030a0000")],
        "extra_compile_args": CXX_FLAGS,
        "language": "c++",
        "py_limited_api": True,
    }
    # First, because the others are not built without it.
    extensions = [
        Extension("cppo._C", list(CPU_SOURCES), libraries=["torch_cpu", "torch", "c10"], **stable)
    ]
    host_include = pybind11_include()
    if host_include:
        options = {"extra_compile_args": CXX_FLAGS, "language": "c++"}
        extensions.append(
            Extension("cppo._host", list(HOST_SOURCES), include_dirs=[host_include], **options)
        )
    else:
        info["host"] = "pybind11 is not installed"
    asked = torch_cuda or flag("CPPO_FORCE_CUDA") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not nvcc:
        info["cuda"] = "nvcc was not found"
    elif not asked:
        info["cuda"] = f"torch {version} is a CPU build and CPPO_FORCE_CUDA is not set"
    else:
        info["cuda_archs"] = cuda_archs(nvcc)
        info["nvcc"] = first_line([nvcc, "--version"])
        stable["define_macros"] = [*stable["define_macros"], ("USE_CUDA", "1")]
        cuda = Extension("cppo._cuda", [CUDA_MODULE], libraries=["torch_cpu", "torch"], **stable)
        cuda.nvcc, cuda.archs = nvcc, info["cuda_archs"]
        # The CPU build of torch has no torch_cuda to link; the kernels still compile and link.
        cuda.libraries += ["torch_cuda"] if (folder / "lib" / "libtorch_cuda.so").exists() else []
        extensions.append(cuda)
    info.update({PARTS[extension.name]: "not compiled yet" for extension in extensions})
    return extensions, info


def record(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build_info.json").write_text(json.dumps(INFO, indent=1) + "\n")
    atexit.unregister(say_result)  # it is said once
    atexit.register(say_result)


def say(line: str) -> None:
    print(f"cppo: {line}", file=sys.stderr, flush=True)


def say_result() -> None:
    """The last line of a build, whatever command it ran."""
    sys.stdout.flush()
    if INFO["cpp"]:
        say(f"pure-Python install, without the compiled tensor ops: {INFO['cpp']}")
        return
    built = [part for part in PARTS.values() if not INFO[part]]
    without = "".join(f"; no {part}: {INFO[part]}" for part in PARTS.values() if INFO[part])
    say(f"compiled ops for torch {INFO['torch']}: {', '.join(built)}{without}")


class BuildPy(build_py):
    """Adds build_info.json, which also exists where nothing is compiled."""

    def run(self) -> None:
        super().run()
        record(ROOT / "cppo" if self.editable_mode else Path(self.build_lib) / "cppo")


class BuildExt(build_ext):
    """Compiles sources in parallel, .cu files with nvcc, and records what became of each part."""

    def build_extensions(self) -> None:
        """Builds every part that can be built, and none of them without the tensor ops."""
        for ext in self.extensions:  # what an earlier build left behind is no part of this one
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        for ext in self.extensions:
            lost = ext.name != "cppo._C" and INFO["cpp"]
            INFO[PARTS[ext.name]] = lost or self.attempt(ext)
        # The list is also the distribution's: empty, it makes a wheel for any Python and machine.
        self.extensions[:] = [ext for ext in self.extensions if not INFO[PARTS[ext.name]]]

    def attempt(self, ext: Extension) -> str:
        """Builds one part; returns why it is missing, or ''."""
        try:
            self.build_extension(ext)
        except Exception as error:
            reason = f"compilation failed: {(str(error) or repr(error)).splitlines()[0][:200]}"
            say(f"{ext.name} was not built: {reason}")
            if flag("CPPO_FORCE_BUILD"):
                atexit.unregister(say_result)  # there is no result
                raise
            return reason
        return ""

    def build_extension(self, ext: Extension) -> None:
        objects = self.compile_objects(ext)
        ext.extra_link_args = [*ext.extra_link_args, *extra_flags()]  # a sanitizer is a library too
        if ext.name == "cppo._cuda":
            self.link_with_nvcc(ext, objects)
        else:
            ext.extra_objects, ext.sources = objects, []
            super().build_extension(ext)

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
            # Last, so that they win over ours.
            extra_postargs=[*ext.extra_compile_args, *source_flags(source), *extra_flags()],
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
        )
        return str(built)

    def compile_cu(self, ext: Extension, source: str) -> str:
        built = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
        built.parent.mkdir(parents=True, exist_ok=True)
        options = ["-c", source, "-o", str(built), "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
        options += ["--fmad=false"]
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


class BdistWheel(bdist_wheel):
    """A wheel for any Python and machine where nothing was compiled, after all."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


EXTENSIONS, INFO = plan()
if not EXTENSIONS and flag("CPPO_FORCE_BUILD"):
    raise SystemExit(
        f"cppo: CPPO_FORCE_BUILD is set but the extension cannot be built: {INFO['cpp']}"
    )

setup(
    # Listed here, not in pyproject.toml, because cppo's packages are found and two are mapped.
    packages=[*find_packages(include=["cppo", "cppo.*"]), "cppo.triton_kernels", "cppo.benchmarks"],
    package_dir={"cppo.triton_kernels": "triton_kernels", "cppo.benchmarks": "benchmarks"},
    ext_modules=EXTENSIONS,
    cmdclass={"bdist_wheel": BdistWheel, "build_ext": BuildExt, "build_py": BuildPy},
)
