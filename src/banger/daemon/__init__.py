"""The daemon: a composition root and its services."""
