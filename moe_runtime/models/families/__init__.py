"""Model families, one file each: `parse(config.json)`, and the names of the sparse block in checkpoints."""
