"""Balancing while serving: watches the load, moves experts between steps, and tells ranks which replicas to use."""
