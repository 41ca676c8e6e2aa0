"""What several routers in front of the same workers tell each other, without I/O, clock or chance of its own."""
