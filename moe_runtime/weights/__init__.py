"""Where weights come from: safetensors, DeepSpeed checkpoints, random numbers."""
