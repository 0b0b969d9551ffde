"""Compiling the headers of the kernels by themselves: what takes Inductor seconds a shape is then one library."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import tfmq_fx

HERE = Path(__file__).parent
HEADERS = Path(tfmq_fx.__file__).parent / "kernels"
BUILD = HERE.parents[1] / "build" / "kernels"
#: For which processor; named one by one, so that it compiles on any x86 too.
PROCESSOR = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx512vnni", "-mfma")
#: What Inductor compiles with, in its order: the later ones take back some of the earlier ones.
OPTIMIZED = (
    *("-O3", "-DNDEBUG", "-fno-trapping-math", "-funsafe-math-optimizations", "-ffinite-math-only"),
    *("-fno-signed-zeros", "-fno-finite-math-only", "-fno-unsafe-math-optimizations", "-ffp-contract=off"),
    "-fno-tree-loop-vectorize",
)
#: Without optimizing, which takes twice as long to compile here and shows the sanitizers less.
SANITIZED = ("-O0", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compiler():
    """The C++ compiler that Inductor takes too; None where there is none."""
    found = (shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    return next((path for path in found if path), None)


def build(source, options):
    """Compile ``source`` beside this file, once for each state of it and of the headers; return the result's path."""
    command = [compiler(), "-std=c++20", "-fopenmp", *PROCESSOR, *options, f"-I{HEADERS}"]
    parts = [path.read_bytes() for path in (*sorted(HEADERS.glob("*.h")), *sorted(HERE.glob("*.cpp")))]
    digest = hashlib.sha256(b"".join([" ".join(command).encode(), *parts])).hexdigest()[:16]
    path = BUILD / f"{Path(source).stem}-{digest}"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        made = subprocess.run([*command, str(HERE / source), "-o", str(unfinished)], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        unfinished.replace(path)
    return path


def can_link(options):
    """Whether the compiler has the libraries that ``options`` ask for."""
    command = [compiler(), *options, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode == 0
