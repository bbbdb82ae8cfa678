"""The compiled CPU kernels, where they were built."""
