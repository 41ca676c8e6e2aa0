"""Several processes that are one router: a supervisor, one that decides, and those that relay."""
