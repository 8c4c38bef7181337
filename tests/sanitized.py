"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make test-sanitized`.

The process in which a kernel reads or writes what is not its own, or does what C++ leaves undefined, ends there, and
its test fails. The extension made so lies in build/sanitized. Leaks are not looked for: Python keeps what it has.
"""

import subprocess
import sys

from variant import COMPILER, ROOT, build, run

MADE = ROOT / "build" / "sanitized"
FLAGS = ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
TESTS = ["ops", "store", "influence", "test_native.py", "test_projection.py", "test_sketch.py"]
# What runs no C++, is killed, or is given less address space than the sanitizer's shadow takes.
LEFT_OUT = "triton or cuda or inductor or crash or limit"


def main() -> int:
    build(MADE, FLAGS)
    named = ["libasan.so", "libubsan.so"]
    found = [
        subprocess.run([*COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in named
    ]
    options = {
        "LD_PRELOAD": ":".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return not run(MADE, TESTS, LEFT_OUT, options)


if __name__ == "__main__":
    sys.exit(main())
