"""A Hugging Face model with adapters in it."""
