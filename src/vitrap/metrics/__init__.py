"""Measures: tensors and numbers in, rates with intervals out."""
