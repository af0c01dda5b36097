"""Speed beside a plain baseline in the same run: `make bench`, or `python -m benchmarks --help`."""
