"""Every instruction set that this machine has, of the extension and of what numba compiles, on the ops' tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_native

from fastseq import jit, native, selfcheck

TESTS = [
    "test_forward_and_tape",
    "test_backward_from_either_tape",
    "test_forward_tape_and_backward",
    "test_padding_is_never_read",
    "gate_functions",
    "nan_and_inf",
    "two_python_threads",
    "test_outputs_and_gradients",
    "test_what_is_not_finite",
    "test_what_no_query_sees",
    "exact_as_torch",
]
FILES = [
    "test_recurrent_ops.py",
    "test_attention_ops.py",
    "test_attention_decoder_ops.py",
    "test_norm.py",
    "test_cross_entropy.py",
    "test_activation.py",
    "test_causal_conv1d.py",
    "test_conv_pool.py",
]


def has(isa: str) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return {"portable": True, "avx2": capability in ("AVX2", "AVX512"), "avx512": capability == "AVX512"}[isa]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_ops_on(isa: str) -> None:
    there = {"cpp": native.unavailable(), "numba": jit.NUMBA.unavailable}
    required = [name for name, reason in there.items() if reason is None]
    if not required:
        require_native()
    if not has(isa):
        pytest.skip(f"this machine does not have {isa}")
    if isa == selfcheck.instruction_set():
        pytest.skip(f"{isa} is what all other tests ran on")
    environment = {**os.environ, "FASTSEQ_CPU_ISA": isa, "FASTSEQ_REQUIRE": ",".join(required)}
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files, "-k", " or ".join(TESTS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_no_instruction_set_leaks_into_shared_code() -> None:
    """The linker keeps one copy of an inline function, from whichever source: none may have been compiled for AVX."""
    require_native()
    objdump = subprocess.run(["which", "objdump"], capture_output=True, text=True).stdout.strip()
    if not objdump:
        pytest.skip("no objdump to look into the extension")
    import fastseq._native

    text = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", fastseq._native.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    function, leaks = "", set()
    for line in text.splitlines():
        if line.endswith(">:"):
            function = line
        elif "avx2" not in function and "avx512" not in function:
            instruction = line.split("\t")[-1]
            if instruction.startswith("v") and "%" in instruction:  # every AVX instruction, on xmm registers too
                leaks.add(function)
    assert not leaks
