"""How many workers there should be (`--autoscale`), and the actuators that act on it."""
