"""The CUDA kernels compile for the processors they are meant for, without a warning."""

import re
import shutil
import subprocess

import pytest

from reference_engine.backends import cupy_backend
from reference_engine.backends.activations import ACTIVATION_CODES
from reference_engine.backends.cupy_sources import COMPILER_OPTIONS, kernel_source
from reference_engine.backends.protocol import FFN_BLOCK_NEURONS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "kernels.cu"
    path.write_text(kernel_source())
    return path


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_every_kernel(source, architecture):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    command = [nvcc, f"-arch={architecture}", *COMPILER_OPTIONS, "--Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    output = source.with_suffix(f".{architecture}.cubin")
    result = subprocess.run([*command, source, "-o", output], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    frames = re.findall(r"(\d+) bytes stack frame", result.stderr)
    assert len(frames) > 60
    assert max(map(int, frames)) <= 64, "a kernel keeps arrays in local memory, or spills more than a few registers"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvrtc_compiles_every_kernel(architecture):
    """With the options that CuPy adds to ours."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="no CuPy, which calls NVRTC")
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    program = nvrtc.createProgram(kernel_source(), "kernels.cu", (), ())
    options = (*COMPILER_OPTIONS, "-ftz=true", f"-arch={architecture}", "--device-as-default-execution-space")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert nvrtc.getCUBIN(program)


def test_constants_agree_with_those_of_the_kernels():
    text = kernel_source()
    constants = dict(re.findall(r"^#define (\w+) (\d+)\b", text, re.MULTILINE))
    for name, value in {
        "FFN_BLOCK": FFN_BLOCK_NEURONS,
        "MATVEC_WARPS": cupy_backend._WARPS,
        "WARP": cupy_backend._WARP_THREADS,
        "TILE": cupy_backend._TILE,
        "TILE_THREADS": cupy_backend._TILE_THREADS,
        "DOWN_THREADS": cupy_backend._DOWN_THREADS,
        "DOWN_GROUPS": cupy_backend._DOWN_GROUPS,
        "COMPACT_THREADS": cupy_backend._COMPACT_THREADS,
        "ATTEND_STRETCH": cupy_backend._STRETCH,
        "ATTEND_BLOCKS": cupy_backend._STRETCHES,
    }.items():
        assert int(constants[name]) == value
    assert int(constants["ATTEND_WARPS"]) * 32 == cupy_backend._ATTEND_THREADS
    assert sorted(map(int, re.findall(r"^        case (\d+): return", text, re.MULTILINE))) == [
        code for kind, code in ACTIVATION_CODES.items() if kind != "identity"
    ]
