"""Time and memory against length: tables of what ``performers benchmark`` wrote."""
