"""The command line: parses, prints, calls one function."""
