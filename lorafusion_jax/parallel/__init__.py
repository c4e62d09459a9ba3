"""parallel room; see its modules."""
