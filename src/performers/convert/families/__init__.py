"""Families of models that can be converted: one protocol of sites, observation, installation."""
