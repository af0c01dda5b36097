"""Training: one loop for every attack, and its recipe."""
