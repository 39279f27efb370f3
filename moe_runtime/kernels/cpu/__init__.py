"""Native CPU kernels: C++ compiled on first use, loaded with ctypes. `native` is the face, `build` the compiler's."""
