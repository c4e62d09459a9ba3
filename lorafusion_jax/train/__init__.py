"""train room; see its modules."""
