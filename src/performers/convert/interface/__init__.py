"""Attention, masks, caches and hooks of converted models, called by transformers."""
