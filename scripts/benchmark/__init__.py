"""Measures this router beside other routers and proxies, and no router at all. `scripts/bench` runs it.

    load, streams, arrivals ──> target ──> workers      native clients and workers (scripts/native), all on loopback
          |                        |
    rates, latencies, delays   CPU time and memory of its whole session, from /proc

All targets of a room (the same workers) run at the same time and are measured one after the other, round by round, in
an order that rotates, so that a disturbance of the machine affects all of them. They get the same prompts. The tables
show medians over the rounds. On a small or shared machine, trust the CPU time: requests per second also depend on how
much CPU clients and workers use.

    __main__        the command: measures, or reads the results of a former run, and shows them
    options         its options
    loads           the table of loads, and the rooms they need
    targets         the table of targets: name, how it is started, version
    environments    installs what comes from PyPI, each in an environment of its own
    plan            which load meets which target when, and how long that takes
    processes       processes in sessions of their own: CPU time, memory, end
    clients         the native programs: built, and run to their result
    measuring       carries out the plan
    memory          --memory: this router's memory over a million prompts
    tree            the prefix tree by itself, beside what its rival publishes
    results         samples, medians, spread; as JSON
    tables          the tables
    verdicts        where rivals are better, and which goals are reached
    chart           docs/performance.svg
    documents       puts all of it into docs/performance.md
"""
