"""Balancing while serving: watches the load, moves experts between steps, tells ranks which replicas to use."""
