"""Apply snapshots, deltas, view definitions and compactions to a store."""
