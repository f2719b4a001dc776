"""Training and evaluating a model on rows, within one process. It knows no rounds."""
