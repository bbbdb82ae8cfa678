"""Protein models with different attentions, trained alike and compared."""
