"""The hot path: client connections, exchanges, legs and connections to workers."""
