"""The built-in engine's options: one line each; flags, defaults and help are derived from it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from sglang_router.engine.kv import KVCache
from sglang_router.engine.scheduler import BatchLimits, CostModel, EngineScheduler
from sglang_router.version import version_line


def _option(default: Any, help: str, **more: Any) -> Any:  # typed as the field it declares
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class EngineOptions:
    """The options of one engine. Each field is the flag of the same name."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(30001, "port to listen on; 0 takes a free one and prints it in the first line of output")
    model: str = _option("built-in", "name of the model in answers")
    lora: str = _option("", "names of adapters that are loaded at the start, with commas between them")
    api_key: str = _option("", "require this key: `Authorization: Bearer KEY`")
    capacity_tokens: int = _option(524_288, "slots of the KV cache, in tokens")
    context_length: int = _option(131_072, "most tokens of prompt and answer together")
    page_size: int = _option(1, "tokens per page of the KV cache")
    prefill_tokens_per_s: float = _option(8000.0, "prompt tokens computed per second")
    decode_base_ms: float = _option(6.0, "fixed duration of a forward pass, in ms")
    decode_ms_per_request: float = _option(0.35, "more duration of a forward pass per request that it decodes, in ms")
    chunked_prefill_size: int = _option(2048, "most prompt tokens computed in one forward pass")
    max_running_requests: int = _option(256, "most requests in the batch")
    dp_size: int = _option(1, "data-parallel ranks: a request's `data_parallel_rank` says which rank's cache it uses")
    enable_mixed_chunk: bool = _option(False, "also decode in passes that prefill")
    speed: float = _option(1.0, "time scale: 2 is twice as fast as the cost model says, 0 as fast as possible")
    startup_delay: float = _option(0.0, "seconds after the start during which /health answers 503")
    seed: int = _option(0, "seed of the answers; engines with the same seed give the same answers")
    log_level: str = _option("warning", "lowest severity that the HTTP server logs to standard error")

    def scheduler(self) -> EngineScheduler:
        """Return a scheduler with these options. Raises ValueError if they are not possible."""
        if min(self.prefill_tokens_per_s, self.chunked_prefill_size, self.max_running_requests, self.dp_size) <= 0:
            raise ValueError("prefill rate, chunk, batch and ranks must be positive")
        if min(self.decode_base_ms, self.decode_ms_per_request, self.speed, self.startup_delay) < 0:
            raise ValueError("times and speed must not be negative")
        return EngineScheduler(
            KVCache(self.capacity_tokens, self.page_size),
            CostModel(self.prefill_tokens_per_s, self.decode_base_ms / 1e3, self.decode_ms_per_request / 1e3),
            BatchLimits(self.chunked_prefill_size, self.max_running_requests, mixed=self.enable_mixed_chunk),
        )

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together that fit."""
        return min(self.context_length, self.capacity_tokens // self.page_size * self.page_size)


def new_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_router.engine",
        description="Simulate an SGLang server: real KV cache, modelled time, generated text without a model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="--backend llamacpp --model-path FILE.gguf … starts a real llama.cpp server instead.",
    )
    parser.add_argument("--version", action="version", version=version_line())
    for option in fields(EngineOptions):
        flag = "--" + option.name.replace("_", "-")
        if isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true", help=option.metadata["help"])
        else:
            parser.add_argument(flag, type=type(option.default), default=option.default, help=option.metadata["help"])
    return parser


def parse_options(argv: list[str]) -> EngineOptions:
    """Read the options in `argv`. A mistake ends the program with one line and status 2, --help with status 0."""
    parser = new_parser()
    options = EngineOptions(**vars(parser.parse_args(argv)))
    try:
        options.scheduler()
    except ValueError as error:
        parser.error(str(error))
    return options
