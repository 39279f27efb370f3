"""Predicts the effect of a placement, of more ranks or of other hardware before anything runs; docs/planner.md."""
