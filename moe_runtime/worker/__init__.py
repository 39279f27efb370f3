"""One rank: its share of the model, its pages, its sequences, its sampler."""
