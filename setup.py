"""Packages and the optional CMake build of ``sosd_fast._C``. Metadata lives in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds sosd_fast._C; without a compiler the install goes on, and the library runs on torch alone."""

    def build_extension(self, ext):
        if self.inplace or self.editable_mode:
            for stale in (Path(__file__).parent / "sosd_fast").glob("_C.*.so"):
                stale.unlink()  # or a build that fails would leave the old one to be used
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        try:
            import pybind11

            configure = [
                "cmake",
                "-S", str(Path(__file__).parent.resolve()),
                "-B", str(build),
                "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            ]  # fmt: skip
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(
                f"warning: sosd_fast._C was not built ({error}). sosd_fast runs on torch alone, more slowly; "
                "install a C++17 compiler and reinstall for the C++ kernels.",
                file=sys.stderr,
            )


setup(
    packages=find_packages(include=["sosd_fast", "sosd_fast.*"]),  # through the link sosd_fast/kernels, too
    package_data={"sosd_fast": ["py.typed"], "": ["*.html"]},
    ext_modules=[Extension("sosd_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
