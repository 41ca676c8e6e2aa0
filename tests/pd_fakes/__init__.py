"""Fakes of engines that split prefill from decode, as faithful as a router can tell.

    edge      the edge of the wire: an HTTP server that can die, freeze, and fail at a chosen moment
    sglang    prefill and decode engines of SGLang: rooms, bootstrap server, deadlines, abort_request
    vllm      engines of vLLM with NIXL pull: kv_transfer_params, leases
    texts     what both make of a prompt
    fleet     an event loop in a thread for tests that block, and what must hold after each of them

Every rule of theirs was measured on real pairs of SGLang 0.5.23 and vLLM 0.32.0, or read in their sources, and
`tests/disaggregation/` holds each. Where the sources leave it open, the fake takes what is worst for a router: nothing
that waits is ever freed by itself before its deadline.

    engine = SglangEngine("prefill")
    await engine.start()                       # engine.url, engine.bootstrap_port
    held = engine.hold(Stage.ADMITTED)         # the next legs stop there ...
    await held.reached()
    engine.kill()                              # ... and die with the engine
"""
