"""Catalogs of what can be pulled, kernels or images: their format, and those that the user adds."""
