"""Attacks and defences of a package of somebody else's, one for each thing that a contract can hold."""
