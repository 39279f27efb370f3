"""Processes of ranks: who starts them, watches them and ends them."""
