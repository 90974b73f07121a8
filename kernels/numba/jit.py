"""Functions that only kernels call, compiled as parts of them.

numba would compile each one on its own, too: optimised, as machine code, with wrappers for Python and C. That would be
most of the time that a kernel takes to compile, and nobody calls them so. What a kernel is made of is optimised once,
all of it together.
"""

from typing import Any

from numba import njit
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.untyped_passes import TranslateByteCode


@register_pass(mutates_CFG=False, analysis_only=True)
class _LeaveUnfinished(FunctionPass):
    """Has the function's library left as it is before optimisation."""

    _name = "fastseq_leave_unfinished"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        library = state.targetctx.codegen().create_library(state.func_id.func_qualname)
        library.enable_object_caching()
        # Were numba to call these by other names one day, it would do again what it need not, and nothing else.
        library._optimize_final_module = lambda: None
        library._finalize_final_module = lambda: setattr(library, "_finalized", True)
        state.library = library
        # Nothing of it is in memory; numba tells functions apart by some function that Python could call.
        state.targetctx = state.targetctx.subtarget(get_executable=lambda *_: [].append)
        return False


class _PartCompiler(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.add_pass_after(_LeaveUnfinished, TranslateByteCode)
        pipeline.finalize()
        return [pipeline]


OPTIONS = dict(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
jit = njit(forceinline=True, pipeline_class=_PartCompiler, **OPTIONS)  # where it is called
# As a function of its own, unless LLVM knows better. (Unsaid, it would be as its first caller is.)
part = njit(forceinline=False, pipeline_class=_PartCompiler, **OPTIONS)
