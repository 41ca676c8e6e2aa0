"""The simulator: loads, simulated engines, and the production router, in virtual time."""
