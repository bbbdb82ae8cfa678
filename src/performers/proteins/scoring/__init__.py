"""Predictions and vectors of a model: metrics, embeddings, new sequences."""
