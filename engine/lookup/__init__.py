"""Look up rows: hash keys, find and gather rows with the kernels, and return columns or a matrix."""
