"""What a placement, a rank more or other hardware will bring, predicted before anything runs; docs/planner.md."""
