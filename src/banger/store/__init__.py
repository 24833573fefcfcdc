"""Persistent records in SQLite."""
