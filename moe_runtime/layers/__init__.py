"""The decoder's layers in torch and on native CPU kernels: attention, gate, sparse block, KV cache."""
