"""From a checkpoint to a model: configurations of families, names of tensors, reading weights into layers."""
