"""Engines on this machine, for `launch_server`: start, watch, restart and stop them."""
