"""Reports on a run, from its records: terminal, page, plots, trackers."""
