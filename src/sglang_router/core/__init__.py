"""Decisions without I/O, clock or chance of their own: `now` and `rng` are arguments."""
