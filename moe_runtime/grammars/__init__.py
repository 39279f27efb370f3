"""Structured output: grammars, and the state of a sequence in its grammar. On llguidance; no torch."""
