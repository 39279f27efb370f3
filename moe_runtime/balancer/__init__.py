"""Expert load, placement and planning; numpy and torch only, no engine."""
