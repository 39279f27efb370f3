"""MoE expert-parallel inference runtime."""

__version__ = "0.1.0"
