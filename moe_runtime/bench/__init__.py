"""`moe-runtime bench`: throughput and latencies of a model at chosen request rates."""
