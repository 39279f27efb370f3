"""Native CPU kernels: C++ compiled on first use, loaded with ctypes. Use `native`; `library` compiles."""
