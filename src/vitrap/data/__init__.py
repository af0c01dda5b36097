"""Data sets: where they are kept, how they are read and held out, poisoned and augmented.

The public names live in the modules (`cache`, `sources`, `prepare`, `poison`, `augment`); nothing is imported
here, so that naming the data sets never waits for torch.
"""
