"""What a run wrote, read again: terminal, report page, plots."""
