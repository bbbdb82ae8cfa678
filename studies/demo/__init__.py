"""The demo's models: a table of what ``performers demo`` wrote."""
