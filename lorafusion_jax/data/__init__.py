"""data room; see its modules."""
