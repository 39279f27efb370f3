"""The user's options, a checkpoint's configuration, expert policies. No torch."""
