"""bench room; see its modules."""
