"""Planning memory before anything is loaded: budget, sizes, initial placement, graph buckets. No torch."""
