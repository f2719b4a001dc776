"""What one process does with a model and rows. It knows no round."""
