"""Protein sequences: files, tokens, objectives, packing, metrics and what attention learnt."""
