"""The front: takes requests, plans steps, hands out tokens. No torch."""
