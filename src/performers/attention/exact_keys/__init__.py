"""The keys that a query meets exactly."""
