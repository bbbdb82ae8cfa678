"""Measures time and memory of attention: cases, checks, memory, times in turns, table, plot."""
