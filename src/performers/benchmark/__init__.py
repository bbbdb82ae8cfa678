"""Measuring code users can run: time and memory of attention, of training steps, of decoding."""
