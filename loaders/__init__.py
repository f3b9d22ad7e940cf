"""What changes a store: loading, applying deltas and pushes, compaction, verification and backup."""
