from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

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

setup(ext_modules=[kernels], cmdclass={"build_ext": build_ext})
