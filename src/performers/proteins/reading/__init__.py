"""Attention of a model, read: similarity of amino acids, scores of heads and of known sites."""
