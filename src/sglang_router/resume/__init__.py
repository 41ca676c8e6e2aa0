"""Continue a broken stream on another worker (`--resume-streams`)."""
