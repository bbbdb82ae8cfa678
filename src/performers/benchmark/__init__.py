"""Measuring code users can run: time, memory and accuracy of attention, models and decoding."""
