"""Builds the compiled parts; everything else about the distribution stands in pyproject.toml.

The CPU core needs a C++17 compiler and pybind11, no torch. Without a compiler the package installs all the same;
`genarm_kernels/_cpu.error` then says why, for `genarm info` to show. GENARM_CPU=1 makes a failed build an error, 0
leaves the core out.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

SOURCES = ["bindings.cpp", *(f"cpu/{name}.cpp" for name in ("guided_step", "isa", "thread_pool"))]
SOURCES += [f"cpu/{isa}.cpp" for isa in ("portable", "avx2", "avx512")]


class BuildCore(build_ext):
    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("GENARM_CPU", "")
        reason_file = Path(self.get_ext_fullpath(ext.name)).parent / "_cpu.error"
        reason_file.unlink(missing_ok=True)
        try:
            if wanted == "0":
                raise RuntimeError("left out by GENARM_CPU=0")
            super().build_extension(ext)
        except Exception as error:
            if wanted == "1":
                raise
            reason_file.parent.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(f"built without the CPU core: {str(error).strip() or type(error).__name__}\n")
            self.warn(f"the CPU core is not built: {error}")


ParallelCompile("GENARM_BUILD_JOBS", default=0).install()  # 0: as many jobs as there are processors
setup(
    cmdclass={"build_ext": BuildCore},
    ext_modules=[
        Pybind11Extension(
            "genarm_kernels._cpu",
            [f"csrc/{source}" for source in SOURCES],
            depends=[str(path) for pattern in ("*.h", "*.inc") for path in sorted(Path("csrc").rglob(pattern))],
            include_dirs=["csrc", "csrc/include"],
            define_macros=[("GENARM_BUILDING", None)],
            cxx_std=17,
            # A sum must not turn into a fused multiply-add where the source has none: all machines give the same bits.
            extra_compile_args=[] if os.name == "nt" else ["-O3", "-ffp-contract=off"],
        )
    ],
)
