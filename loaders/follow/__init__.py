"""Follow an export root: decide which entries come next, apply them, retry and repair."""
