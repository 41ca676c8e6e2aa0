"""What `launch_server` adds to the router: engines started, watched, restarted and ended on this machine."""
