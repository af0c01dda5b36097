"""Networks: opening and saving them, observing what happens inside, and changing how they run."""
