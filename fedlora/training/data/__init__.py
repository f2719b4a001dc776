"""Data: from a source of rows to batches of token ids."""
