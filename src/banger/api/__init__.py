"""The contract between clients and the daemon: models, errors, operations, client."""
