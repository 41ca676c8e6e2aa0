"""Automatic scaling: reads the fleet, has `core.scaling` decide, and tells those who start and stop workers."""
