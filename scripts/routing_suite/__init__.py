"""Which router places which load best? Writes the tables of docs/routing.md. `scripts/routing-suite` runs it.

rows ──> replays   each policy of this router, in virtual time: the same tables on each machine
     └─> live      this router and others as processes, in real time, before the same simulated engines
            │
            └──> samples (a file) ──> tables ──> page: docs/routing.md

__main__   the command
rows       the loads of both modes
replays    runs `sglang-router replay`
scripted   a generated load as texts and moments: what the client of a live run sends
client     sends it to a router, and keeps what comes back
answers    reads an answer: tokens, and whether it is whole
routers    the routers that are compared as processes
live       one run: engines, router and client
figures    the figures of a run
samples    the figures of many runs, in a file
tables     the tables, and where another router is better
page       puts them into docs/routing.md
"""
