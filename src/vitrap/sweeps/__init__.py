"""Sweeps: many runs from one spec with a grid, done by workers on this machine or on a Ray cluster."""
