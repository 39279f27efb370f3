"""Dispatchers: token rows to the ranks of their slots and back."""
