"""Attention with ordinary torch operations, linear in time and memory."""
