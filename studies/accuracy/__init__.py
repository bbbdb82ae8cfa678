"""How far attention through random features is from exact attention."""
