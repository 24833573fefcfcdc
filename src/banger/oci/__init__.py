"""Images in registries: references, credentials, and a client of the OCI Distribution protocol."""
