"""Bytes of novels at 8,192 tokens: attentions at equal time, and redraws of the features."""
