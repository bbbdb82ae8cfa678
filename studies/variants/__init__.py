"""Measured effects of substitutions, and scores of them."""
