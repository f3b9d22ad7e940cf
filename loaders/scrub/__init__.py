"""Verify a served store in the background: choose the next chunk, pace the reads, and read past the page cache."""
