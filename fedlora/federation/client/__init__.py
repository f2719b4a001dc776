"""The client's side of a run: how it answers each message."""
