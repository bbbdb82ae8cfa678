"""Experiments with Performers: each asks a question, and writes a page of results."""
