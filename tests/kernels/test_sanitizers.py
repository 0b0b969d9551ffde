"""The headers under the address and undefined-behaviour sanitizers, beside guard bytes and guard pages."""

import os
import platform
import subprocess

import pytest
from hypothesis import settings

from tests.kernels.toolchain import HEADERS, OPTIMIZED, PROCESSOR, SANITIZED, build, can_link, compiler
from tfmq_fx.kernels import has_native_kernels

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels are for x86"),
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
]
#: Dozens of shapes of each kernel in `make test`, thousands in `make nightly`.
COUNT = 20 * settings.default.max_examples


def run(path, seed):
    # Leaks cannot be looked for in every container, and the kernels own what they allocate.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    shown = subprocess.run([path, str(COUNT), str(seed)], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == [str(COUNT)]


@pytest.mark.skipif(compiler() is None or not can_link(SANITIZED), reason="the compiler has no sanitizers")
def test_no_shape_leads_out_of_bounds():
    path = build("sanitize.cpp", SANITIZED)
    if not has_native_kernels():
        pytest.skip("compiled only: this processor has no AVX-512 VNNI")
    run(path, 1)


def test_no_shape_leads_out_of_bounds_once_optimized():
    """What the compiler makes of it as the product has it; the guard pages are left to stop it."""
    path = build("sanitize.cpp", OPTIMIZED)
    if not has_native_kernels():
        pytest.skip("compiled only: this processor has no AVX-512 VNNI")
    run(path, 2)


@pytest.mark.parametrize("header", ["vnni.h", "conv.h", "image.h", "norm.h", "pointwise.h", "attention.h"])
def test_each_header_stands_alone(header):
    """An Inductor kernel includes one of them, behind nothing that it could borrow from."""
    command = [compiler(), "-std=c++20", "-fopenmp", *PROCESSOR, "-fsyntax-only", "-x", "c++", "-"]
    source = f'#include "{HEADERS / header}"\n'
    shown = subprocess.run(command, input=source, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
