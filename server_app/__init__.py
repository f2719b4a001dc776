"""The server half of fedlora as a Flower app."""
