"""Builds the compiled parts; everything else about the distribution stands in pyproject.toml.

The CPU core needs a C++17 compiler and pybind11, no torch; the CUDA kernels nvcc besides (in PATH or CUDA_HOME). What
cannot be built is left out, and the package installs all the same; `genarm_kernels/_cpu.error` or `_cuda.error` then
says why, for `genarm info` to show. GENARM_CPU=1 or GENARM_CUDA=1 makes a failed build an error, 0 leaves the part out.
GENARM_CUDA_ARCHS ("80;90;100") are the GPUs' compute capabilities; the last one's PTX is for later GPUs.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

SOURCES = ["python/cpu.cpp", *(f"cpu/{name}.cpp" for name in ("operations", "decoder", "isa", "thread_pool"))]
SOURCES += [f"cpu/{isa}.cpp" for isa in ("portable", "avx2", "avx512")]
# By part, what its sources include: an edit builds only the parts that it concerns.
HEADERS = {
    part: [str(path) for folder in ("include", "common", part) for path in sorted(Path("csrc", folder).glob("*.[hi]*"))]
    for part in ("cpu", "cuda")
}
for headers in HEADERS.values():
    headers.append("csrc/python/bindings.h")
HEADERS["cpu"].append("csrc/python/torch_threads.h")
NAMES = {"cpu": "CPU core", "cuda": "CUDA kernels"}
CUDA_ARCHS = os.environ.get("GENARM_CUDA_ARCHS", "80;90;100").replace(",", ";")


class BuildParts(build_ext):
    def run(self) -> None:
        self.in_place = self.inplace or self.editable_mode  # setuptools' own run() takes the former for False meanwhile
        super().run()

    def build_extension(self, ext: Extension) -> None:
        part = ext.name.rpartition("_")[2]  # cpu or cuda
        wanted = os.environ.get(f"GENARM_{part.upper()}", "")
        target = Path(self.get_ext_fullpath(ext.name))
        reason_file = (Path("genarm_kernels") if self.in_place else target.parent) / f"_{part}.error"
        reason_file.unlink(missing_ok=True)
        try:
            if wanted == "0":
                raise RuntimeError(f"left out by GENARM_{part.upper()}=0")
            if self.is_built(ext, target):
                return
            if part == "cuda":
                self.build_with_nvcc(ext, target)
            else:
                super().build_extension(ext)
        except Exception as error:
            if wanted == "1":
                raise
            reason_file.parent.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(f"built without the {NAMES[part]}: {str(error).strip() or type(error).__name__}\n")
            ext.optional = True  # nothing to copy, then
            target.unlink(missing_ok=True)  # of an earlier build
            if self.in_place:
                (Path("genarm_kernels") / target.name).unlink(missing_ok=True)
            self.warn(f"the {NAMES[part]}: not built: {error}")

    def is_built(self, ext: Extension, target: Path) -> bool:
        """By an earlier call, in place, also for another environment: pip has setuptools build in an empty folder."""
        built = Path("genarm_kernels") / target.name
        newest = max(Path(file).stat().st_mtime for file in (*ext.sources, *ext.depends, "setup.py"))
        if not built.exists() or built.stat().st_mtime <= newest:
            return False
        archs_inside = f"\0{CUDA_ARCHS}\0".encode()  # as _cuda.ARCHITECTURES
        if ext.name.endswith("_cuda") and archs_inside not in built.read_bytes():
            return False
        if built.resolve() != target.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
        return True

    def build_with_nvcc(self, ext: Extension, target: Path) -> None:
        """The CUDA runtime is linked in and no torch is, so that one build serves every torch."""
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if nvcc is None:
            raise RuntimeError("no nvcc in PATH or CUDA_HOME/bin")
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = CUDA_ARCHS.split(";")
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        python = [sysconfig.get_paths()["include"], pybind11.get_include()]
        flags = ["-std=c++17", "-O3", "-DGENARM_BUILDING", f'-DGENARM_CUDA_ARCHS="{CUDA_ARCHS}"']
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        flags += [f"-I{folder}" for folder in ("csrc", "csrc/include", *python)]
        kernels, bindings = ext.sources
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / "kernels.o"), str(folder / "bindings.o")]
        for command in (
            [*codes, "--threads=0", *flags, "-c", kernels, "-o", objects[0]],
            [*flags, "-c", bindings, "-o", objects[1]],
            ["-shared", "-cudart=static", *objects, "-o", str(target)],
        ):
            done = subprocess.run([nvcc, *command], capture_output=True, text=True)
            print(done.stdout + done.stderr, end="")
            if done.returncode:
                raise RuntimeError(f"nvcc ended in {done.returncode}: {(done.stderr or done.stdout).strip()[:500]}")


ParallelCompile("GENARM_BUILD_JOBS", default=0).install()  # 0: as many jobs as there are processors
setup(
    cmdclass={"build_ext": BuildParts},
    ext_modules=[
        Pybind11Extension(
            "genarm_kernels._cpu",
            [f"csrc/{source}" for source in SOURCES],
            depends=HEADERS["cpu"],
            include_dirs=["csrc", "csrc/include"],
            define_macros=[("GENARM_BUILDING", None)],
            cxx_std=17,
            # A sum must not turn into a fused multiply-add where the source has none: all machines give the same bits.
            extra_compile_args=[] if os.name == "nt" else ["-O3", "-ffp-contract=off"],
        ),
        Extension("genarm_kernels._cuda", ["csrc/cuda/operations.cu", "csrc/python/cuda.cpp"], depends=HEADERS["cuda"]),
    ],
)
