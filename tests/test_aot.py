"""What Triton kernels become for GPUs that are not here. `make gpu-aot` shows all of it."""

import platform

import pytest
import torch

from fastseq import jit

if jit.is_interpreted():
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)
if platform.system() != "Linux":
    pytest.skip("Triton is there on Linux only", allow_module_level=True)

import aot
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

# The first of each module, in which its kernels are to be fast: nothing may go through the stack there, but for a few
# words of recurrent kernels on sm_100, whose plans were made for the registers of sm_90.
STACK = dict(
    activation=0,
    attention=0,
    attention_decoder=0,
    causal_conv1d=0,
    cross_entropy=0,
    norm=0,
    lstm=0,
    gru=16,
    rnn_tanh=16,
    rnn_relu=16,
)
MAIN = [(module, list(aot.configurations(module))[:2]) for module in aot.modules()]
BUILDS = [
    (module, configuration, dtype, capability)
    for module, configurations in MAIN
    for configuration, dtype in zip(configurations, ("bfloat16", "float16"), strict=False)
    for capability in aot.SHARED_LIMIT
]


@pytest.mark.parametrize(("module", "configuration", "dtype", "capability"), BUILDS)
def test_main_configurations(module: str, configuration: str, dtype: str, capability: int) -> None:
    found = aot.build(module, configuration, dtype, capability)
    assert found
    for artefact in found:
        assert artefact.shared <= aot.SHARED_LIMIT[capability], artefact
        assert artefact.stack <= (STACK[module] if capability == 100 else 0), artefact
        assert bool(artefact.matrix) == artefact.has_dot, artefact
        assert artefact.has_wide_loads, artefact


def test_what_is_compiled_is_what_a_launch_compiles() -> None:
    """The same types, constants and divisibilities as Triton finds in the arguments when it launches."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for configuration in aot.configurations("attention").values():
        with aot.recorded() as launches:
            configuration(torch.bfloat16, 90)
        for launch in launches:
            kernel, source = launch.kernel, aot.source_of(launch)
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            bound = bind(**launch.args, **launch.options, debug=False, instrumentation_mode="")
            _, signature, constants, attributes = kernel._pack_args(backend, launch.options, *bound)
            assert (signature, constants) == (source.signature, source.constants)
            assert {path: found for path, found in attributes.items() if found} == source.attrs


def test_the_newest_instructions_are_used() -> None:
    """Those that multiply out of shared memory on sm_90 and out of tensor memory on sm_100."""
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")):
        found = aot.build("attention", "128", "float16", capability)
        assert all(instruction in artefact.matrix for artefact in found if artefact.has_dot)
