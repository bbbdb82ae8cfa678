"""One long row over processes against one process: losses, parameters, memory, traffic."""
