"""Pointer networks with linear attention, trained short and scored long."""
