"""Checks `moe_runtime.weights` against the libraries that define the formats."""
