"""What the user asked for and what a checkpoint is: options, model configuration, expert policies. No torch."""
