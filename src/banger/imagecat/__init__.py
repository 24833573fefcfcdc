"""The image catalog: entries on disk, importing, and what can be pulled."""
