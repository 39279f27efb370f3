"""Expert weights in slots and their grouped forward."""
