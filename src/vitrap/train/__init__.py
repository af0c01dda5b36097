"""Training: one loop for every attack and repair, its recipe, optimiser and arithmetic."""
