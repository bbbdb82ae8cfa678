"""Sequences as models read them: FASTA, tokens, packed rows, targets of the objectives."""
