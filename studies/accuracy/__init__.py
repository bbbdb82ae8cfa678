"""Distance of attention through random features from exact attention."""
