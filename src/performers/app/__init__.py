"""Tools that every command and the packages below it share."""
