"""Linear probes of embeddings."""
