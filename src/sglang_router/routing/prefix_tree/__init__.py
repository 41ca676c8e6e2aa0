"""Which worker holds which prompt prefix: a radix tree over bytes."""
