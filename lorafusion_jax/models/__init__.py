"""models room; see its modules."""
