"""What starts a federation: here, on several machines, many at once, or to attack it."""
