"""Data sets: storing, reading, holding out, poisoning and augmenting them.

Import from the modules (`cache`, `sources`, `prepare`, `poison`, `augment`). Nothing is imported here, so that listing
the data sets never waits for torch.
"""
