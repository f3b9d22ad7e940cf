"""Back up, restore and verify stores, and reset one that lost data."""
