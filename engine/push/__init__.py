"""Check pushed rows against their view and encode them for the writer."""
