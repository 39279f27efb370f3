"""Dispatchers: send token rows to the ranks of their slots, and return the results."""
