"""The guest: its boot archive and the host side of the guest protocol."""
