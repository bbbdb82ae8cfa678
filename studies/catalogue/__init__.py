"""Softmax over many items: how good samplers are, and what models trained with them lose."""
