"""Host networking for guests."""
