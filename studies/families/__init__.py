"""Proteins read with their relatives in one context: a ceiling, copying, real families."""
