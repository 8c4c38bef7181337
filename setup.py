import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from glob import glob
from pathlib import Path

from setuptools import Distribution, setup

try:
    import pybind11
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:
    sys.exit("building logra_kernels needs pybind11, which this Python has not: pip install 'pybind11>=3.0,<4'")

ParallelCompile("LOGRA_KERNELS_JOBS", default=0).install()

kernels = Pybind11Extension(
    "logra_kernels._C",
    [*sorted(glob("csrc/*/cpu*.cpp")), "python/module.cpp"],
    depends=sorted(glob("csrc/*/*.h") + glob("csrc/*/*.inc") + glob("python/*")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=fast"],
    extra_link_args=["-fopenmp"],
    optional=True,  # without a compiler the package runs on its reference implementations
)


def is_built(target: Path, inputs: list[str]) -> bool:
    """Whether `target` is newer than what it is made of. If not it is removed: a build that fails leaves none."""
    if target.exists() and target.stat().st_mtime > max(os.path.getmtime(path) for path in inputs):
        return True
    target.unlink(missing_ok=True)
    return False


class BuildKernels(build_ext):
    """The C++ kernels, then the CUDA ones by one call of nvcc.

    LOGRA_KERNELS_CPP=0: leave the C++ kernels as they are.
    LOGRA_KERNELS_CUDA: unset, build them where nvcc is and say so where that fails; 1, they must build; 0, do not.
    LOGRA_KERNELS_CUDA_ARCHS: compute capabilities, "80;90a" by default; 90a has kernels of its own. The last one's PTX,
    without what is its own, is kept for later devices.
    """

    def build_extension(self, ext: Pybind11Extension) -> None:
        """What lies in place, newer than its sources, is not built again; setuptools copies the target back there."""
        if os.environ.get("LOGRA_KERNELS_CPP") == "0":
            return
        target = Path(self.get_ext_fullpath(ext.name))
        here = Path("logra_kernels", target.name)
        if not self._in_place or not is_built(here, [*ext.sources, *ext.depends, "setup.py"]):
            target.unlink(missing_ok=True)
            return super().build_extension(ext)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(here, target)

    def run(self) -> None:
        self._in_place = self.inplace or getattr(self, "editable_mode", False)  # setuptools before 64 has no such mode
        super().run()
        target = Path(self.get_ext_fullpath("logra_kernels._C_cuda"))
        sources = [*sorted(glob("csrc/*/cuda.cu")), "python/cuda_module.cpp"]
        headers = [*glob("csrc/*/cuda*.h"), *glob("csrc/*/*.cuh"), *glob("csrc/common/*.h"), "csrc/encoded/rows.h"]
        if is_built(target, [*sources, *headers, "python/arguments.h", "setup.py"]):
            return
        asked = os.environ.get("LOGRA_KERNELS_CUDA", "")
        nvcc = shutil.which("nvcc")
        if asked == "0" or (nvcc is None and asked != "1"):
            return
        try:
            self._build_cuda(nvcc or "nvcc", sources, target)
        except (OSError, subprocess.CalledProcessError) as error:
            if asked == "1":
                raise
            warnings.warn(f"logra_kernels._C_cuda is not built: {error}", stacklevel=1)

    def _build_cuda(self, nvcc: str, sources: list[str], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("LOGRA_KERNELS_CUDA_ARCHS", "80;90a").split(";")
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        later = archs[-1].rstrip("af")
        codes.append(f"-gencode=arch=compute_{later},code=compute_{later}")
        if "90a" in archs:
            codes.append("-DLGK_SM90A")
        includes = ["csrc", pybind11.get_include(), sysconfig.get_path("include")]
        flags = [
            "-O3",
            "-std=c++17",
            "-shared",
            "--cudart=static",
            "--threads=0",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ]
        command = [nvcc, *flags, *codes, *(f"-I{path}" for path in includes), *sources, "-o", str(target)]
        print(" ".join(command), file=sys.stderr)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
        Path("build").mkdir(exist_ok=True)
        Path("build", "nvcc.log").write_text(done.stderr)  # read by the tests: ptxas tells what it could not keep apart


class InPlace(Distribution):
    """Kernels built in place need no metadata: pyproject.toml, which setuptools before 77 refuses, is not read."""

    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        if "--inplace" not in sys.argv:
            super().parse_config_files(*args, **kwargs)


setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels}, distclass=InPlace)
