"""The privacy lab: attacks on a run's updates, and what privacy costs."""
