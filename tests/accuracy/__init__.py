"""The benchmark of the benchmark: `make accuracy`. See __main__.py."""
