"""The command line: one file per command, and `launch` for torchrun's processes."""
