"""banger: a real Linux machine in one command."""

__version__ = "0.1.0"
