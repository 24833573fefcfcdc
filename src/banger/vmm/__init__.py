"""Virtual machine monitors behind one driver protocol."""
