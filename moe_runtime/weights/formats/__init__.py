"""Formats of quantised matrices on disk, each read into a `QuantizedMatrix`."""
