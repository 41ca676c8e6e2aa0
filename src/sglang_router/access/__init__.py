"""Who may ask: keys, roles, where a request comes from, TLS."""
