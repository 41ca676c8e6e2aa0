"""Build the router from its options, listen, run the periodic jobs, start and stop."""
