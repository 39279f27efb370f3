"""HTTP: FastAPI application, protocol, streaming, metrics."""
