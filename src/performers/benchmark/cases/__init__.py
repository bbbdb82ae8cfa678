"""The benchmarks: each a list of cases."""
