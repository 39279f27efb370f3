"""What scripts that test a running server share: starting it, watching its processes, talking to it."""
