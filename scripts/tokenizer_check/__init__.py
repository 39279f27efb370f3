"""Checks `moe_runtime.text` on the tokenizers that packages ship."""
