"""What is held where, before anything is loaded: budget, sizes, first placement, graph buckets. No torch."""
