"""lora room; see its modules."""
