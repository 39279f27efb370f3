"""Every op of the model: torch twins, Triton, native CPU kernels. `kernels.ops` is the face of torch and Triton."""
