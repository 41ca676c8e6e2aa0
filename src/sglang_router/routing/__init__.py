"""The decision: which worker gets a request, when it waits, whether it is tried again. Pure: no I/O, no clock."""
