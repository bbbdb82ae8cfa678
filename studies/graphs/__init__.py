"""Attention on graphs: molecules, the dependency graph of Debian, time and memory."""
