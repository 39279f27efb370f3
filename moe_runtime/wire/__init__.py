"""What the front and the ranks say to each other, and how it travels. No torch."""
