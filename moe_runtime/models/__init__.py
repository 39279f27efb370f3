"""From a checkpoint to a model: configurations of families, tensor names, reading weights into layers."""
