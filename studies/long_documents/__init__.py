"""Retrieval of long documents by one embedding each, from a converted model and from its original."""
