"""Performers and sparse attention: four claims of the Performer article, measured."""
