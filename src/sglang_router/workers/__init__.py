"""How workers become and stay known: sources, membership, health checks, what engines say, ranks."""
