"""Commands that ask a running router, and what goes with the console command: completion, manual page, checks."""
