"""The client half of fedlora as a Flower app."""
