"""What `scripts/check_gguf` runs."""
