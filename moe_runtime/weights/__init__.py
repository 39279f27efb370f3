"""Sources of weights: safetensors, DeepSpeed checkpoints, random numbers."""
