"""A deployment: its directory, keys and certificates, and what keeps it running on one host."""
