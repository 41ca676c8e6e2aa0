"""The forms in which engines tell what tokens a request took: records apart from `wire.usage`, which mypyc compiles.

A record with a figure that cannot be one is none: negative, not an integer, above MOST.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

MOST: Final = 1 << 40
"""Tokens of a prompt or an answer."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)] | None


class Details(msgspec.Struct, gc=False):
    """OpenAI's details of the prompt's tokens."""

    cached_tokens: Count = None


class Spent(msgspec.Struct, gc=False):
    """The figures of one answer, by the names that engines use.

    prompt_tokens, completion_tokens, prompt_tokens_details     OpenAI
    prompt_tokens, completion_tokens, cached_tokens             SGLang's meta_info
    input_tokens, output_tokens, input_tokens_details           OpenAI's /v1/responses
    input_tokens, output_tokens, cache_...                      Anthropic: input_tokens are those not in the cache
    prompt_n, cache_n, predicted_n                              llama.cpp's timings: prompt_n are those not in the cache
    """

    prompt_tokens: Count = None
    completion_tokens: Count = None
    prompt_tokens_details: Details | None = None
    cached_tokens: Count = None
    input_tokens: Count = None
    output_tokens: Count = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: Count = None
    cache_creation_input_tokens: Count = None
    prompt_n: Count = None
    cache_n: Count = None
    predicted_n: Count = None


class UsageForm(msgspec.Struct, gc=False):
    """An answer, or the rest of one.

    response, message              those in events of /v1/responses and /v1/messages; of Ollama the text, which is none
    prompt_eval_count, eval_count  Ollama's tokens of the prompt and of the answer
    """

    usage: Spent | None = None
    meta_info: Spent | None = None
    timings: Spent | None = None
    response: UsageForm | str | None = None
    message: UsageForm | None = None
    prompt_eval_count: Count = None
    eval_count: Count = None
