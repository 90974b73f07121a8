// The Python module fastseq._native. Importing it runs the static initialisers that register fastseq_native::*.
#include <Python.h>

#include <exception>

#include "cpu/isa.h"

namespace {

// No torch op: it must answer inside of any mode or trace.
PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(fastseq::name_of(fastseq::cpu_isa()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {{"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels."}, {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "fastseq's compiled kernels", -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
