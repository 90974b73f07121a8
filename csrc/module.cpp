// The Python module fastseq._native. Importing it runs the static initialisers that register fastseq_native::*.
#include <Python.h>

PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "fastseq's compiled kernels", -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
