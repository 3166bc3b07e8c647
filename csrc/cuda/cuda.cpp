// `import cppo._cuda` loads the CUDA kernels, each file of which registers what it implements; the
// schemas are in ../cppo.cpp.

#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
