"""Find what changed in a source since the previous run: hashes, ledger, low watermark and guards."""
