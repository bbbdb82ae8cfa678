"""Retrieval of long documents by their embeddings, from a converted model and its original."""
