"""What a router hands to the next one: its state, by a file, and its listening sockets."""
