"""What `make cuda-check` finds fault with."""

import shutil
from pathlib import Path

import cuda_check
import pytest

if not shutil.which("nvcc"):
    pytest.skip("nvcc is not there", allow_module_level=True)

HOLDS_MUCH = """
namespace fastseq::gpu {
enum Math { kBfloat16, kFloat16, kTf32, kExact };
struct Cell {};
template <typename Cell, Math kMath, int kCount>
__global__ void __launch_bounds__(1024) hold(float* p) {
  __shared__ float all[128];
  float own[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) own[i] = p[i * 1024 + threadIdx.x];
  all[threadIdx.x % 128] = own[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) p[i * 1024 + threadIdx.x] = own[i] + all[i];
}
template __global__ void hold<Cell, kTf32, 4>(float*);
template __global__ void hold<Cell, kExact, 96>(float*);
}
"""


def compiled(folder: Path, text: str) -> list[cuda_check.Kernel]:
    source = folder / "kernel.cu"
    source.write_text(text)
    return cuda_check.compiled(source, 90)


def test_registers_spills_and_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = sorted(compiled(tmp_path, HOLDS_MUCH), key=lambda kernel: kernel.spilled)
    assert (few.stack, few.spilled, few.shared, few.wrong) == (0, 0, 512, "")
    assert 4 < few.registers <= 64
    assert many.registers == 64 and many.spilled > 0 and many.shared == 512
    assert "bytes on the stack" in many.wrong
    if shutil.which("c++filt"):
        assert [few.name, many.name] == ["hold<Cell, tf32, 4>", "hold<Cell, exact, 96>"]
    monkeypatch.setitem(cuda_check.SPILLS, "hold.*96", 100_000)
    assert not many.wrong


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(cuda_check.CompileError, match="never referenced"):
        compiled(tmp_path, "__global__ void hold(float* p) { int nothing; *p = 0; }")


def test_what_does_not_compile(tmp_path: Path) -> None:
    with pytest.raises(cuda_check.CompileError, match="wrong"):
        compiled(tmp_path, "wrong")


def test_host_code_that_does_not_fit_cudas_headers(tmp_path: Path) -> None:
    source = tmp_path / "host.cpp"
    source.write_text('#include "cuda/launch.h"\nint count() { return fastseq::gpu::chip_of(0).multiprocessors; }\n')
    cuda_check.check_host(source)
    source.write_text('#include "cuda/launch.h"\nint count() { return cudaNoSuchFunction(); }\n')
    with pytest.raises(cuda_check.CompileError, match="cudaNoSuchFunction"):
        cuda_check.check_host(source)
