"""Endpoints that answer with numbers or tokens: embeddings, rerank, score, classify, (de)tokenize, transcriptions.

The vector of a text is the sum of one fixed direction per token, with unit length. Texts that share words are therefore
similar, which is enough to test a router. The engine computes each input like a prompt, without an answer.
"""

from __future__ import annotations

import base64
import math
import time
import uuid
import zlib
from array import array
from collections.abc import Awaitable, Callable, Sequence
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sglang_router.engine.answer import compute, json_response
from sglang_router.engine.parse import Body, BodyParser, need, read_object
from sglang_router.engine.runner import Engine, EngineError, EngineGeneration, EngineJob
from sglang_router.engine.text import content_text, render_chat

WIDTH = 64
LABELS = ("LABEL_0", "LABEL_1")

Tokens = Sequence[int]


def embed(tokens: Tokens, width: int = WIDTH) -> list[float]:
    """Return the unit vector of `tokens`: `width` numbers."""
    sums = [0.0] * width
    for token in tokens:
        spot = zlib.crc32(token.to_bytes(4, "little"))
        sums[spot % width] += 1.0 if spot & 0x80000000 else -1.0
    norm = math.sqrt(sum(part * part for part in sums)) or 1.0
    return [part / norm for part in sums]


def similarity(first: Tokens, second: Tokens) -> float:
    """Return the cosine similarity of two texts, -1 to 1."""
    return sum(a * b for a, b in zip(embed(first), embed(second), strict=True))


class VectorEndpoints:
    """The handlers; each takes a decoded body and returns the answer."""

    def __init__(self, engine: Engine, parser: BodyParser) -> None:
        self._engine = engine
        self._parser = parser

    def routes(self) -> list[Route]:
        """Return the routes of all handlers, with all paths of each."""
        table: dict[str, Callable[[Request, Body], Awaitable[object]]] = {
            "/v1/embeddings": self.embeddings,
            "/v1/classify": self.classify,
            "/classify": self.classify,
            "/v1/rerank": self.rerank,
            "/rerank": self.rerank,
            "/v1/score": self.score,
            "/v1/tokenize": self.tokenize,
            "/tokenize": self.tokenize,
            "/v1/detokenize": self.detokenize,
            "/detokenize": self.detokenize,
        }
        routes = [Route(path, self._endpoint(handler), methods=["POST"]) for path, handler in table.items()]
        return [*routes, Route("/v1/audio/transcriptions", self.transcriptions, methods=["POST"])]

    def _endpoint(self, handler: Callable[[Request, Body], Awaitable[object]]) -> Callable[..., Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return json_response(await handler(request, read_object(await request.body())))

        return endpoint

    async def embeddings(self, request: Request, body: Body) -> object:
        """Answer OpenAI's embeddings: `input`, `dimensions`, `encoding_format`."""
        prompts, _ = self._parser.prompts(need(body, "input", (str, list)), "input")
        width = WIDTH if body.get("dimensions") is None else body["dimensions"]
        if type(width) is not int or not 1 <= width <= 4096:
            raise EngineError(400, "'dimensions' must be a whole number from 1 to 4096.")
        done = await self._compute(request, prompts)
        packed = body.get("encoding_format") == "base64"
        items = []
        for index, prompt in enumerate(prompts):
            vector: object = embed(prompt, width)
            if packed:
                vector = base64.b64encode(array("f", embed(prompt, width)).tobytes()).decode()
            items.append({"object": "embedding", "index": index, "embedding": vector})
        return {"object": "list", "data": items, "model": self._model(body), "usage": _usage(done)}

    async def classify(self, request: Request, body: Body) -> object:
        """Answer with two labels and the share of each."""
        prompts, _ = self._parser.prompts(body.get("input") or need(body, "text", (str, list)), "input")
        done = await self._compute(request, prompts)
        items = []
        for index, prompt in enumerate(prompts):
            second = 0.5 + embed(prompt)[0] / 2
            label = LABELS[second > 0.5]
            items.append({"index": index, "label": label, "probs": [1 - second, second], "num_classes": len(LABELS)})
        frame = {"id": "classify-" + uuid.uuid4().hex, "object": "list", "created": int(time.time())}
        return frame | {"model": self._model(body), "data": items, "usage": _usage(done)}

    async def rerank(self, request: Request, body: Body) -> object:
        """Answer with `documents` in order of similarity to `query`, the best first; `top_n` of them."""
        query = self._parser.tokenizer.encode(need(body, "query", str))
        documents = need(body, "documents", list)
        texts = [self._parser.tokenizer.encode(content_text(document)) for document in documents]
        done = await self._compute(request, [[*query, *text] for text in texts])
        ranked = sorted(
            ({"score": similarity(query, text), "index": index} for index, text in enumerate(texts)),
            key=lambda one: (-one["score"], one["index"]),
        )
        withtext = body.get("return_documents", True)
        return [
            {
                **one,
                "document": documents[int(one["index"])] if withtext else None,
                "meta_info": _meta(done, one["index"]),
            }
            for one in ranked[: body.get("top_n") or len(ranked)]
        ]

    async def score(self, request: Request, body: Body) -> object:
        """Answer, for each of `items` after `query`, with a number per label; with `apply_softmax` they sum to one."""
        encode = self._parser.tokenizer.encode
        query = encode(need(body, "query", str))
        items = need(body, "items", (str, list))
        prompts = [[*query, *encode(content_text(item))] for item in ([items] if isinstance(items, str) else items)]
        labels = need(body, "label_token_ids", list)
        done = await self._compute(request, prompts)
        scores = [[math.exp(4 * similarity(prompt, [label])) for label in labels] for prompt in prompts]
        if body.get("apply_softmax"):
            scores = [[one / sum(row) for one in row] for row in scores]
        return {"object": "scoring", "model": self._model(body), "scores": scores, "usage": _usage(done)}

    async def tokenize(self, request: Request, body: Body) -> object:
        """Answer with the tokens of `prompt`, a text or a list of texts, or of a conversation in `messages`."""
        encode = self._parser.tokenizer.encode
        if body.get("prompt") is None and body.get("messages") is not None:
            body = {"prompt": render_chat(need(body, "messages", list), body.get("tools"))}
        prompt = need(body, "prompt", (str, list))
        tokens = encode(prompt) if isinstance(prompt, str) else [encode(content_text(one)) for one in prompt]
        sizes = len(tokens) if isinstance(prompt, str) else [len(one) for one in tokens if isinstance(one, list)]
        return {"tokens": tokens, "count": sizes, "max_model_len": self._engine.context}

    async def detokenize(self, request: Request, body: Body) -> object:
        """Answer with the text of `tokens`, one list or several."""
        tokens = need(body, "tokens", list)
        many = bool(tokens) and all(isinstance(one, list) for one in tokens)
        if not all(type(token) is int for one in (tokens if many else [tokens]) for token in one):
            raise EngineError(400, "'tokens' must be token ids.")
        decode = self._parser.tokenizer.decode
        return {"text": [decode(one) for one in tokens] if many else decode(tokens)}

    async def transcriptions(self, request: Request) -> Response:
        """Answer OpenAI's transcriptions: multipart, `file` and `response_format`. Equal files get equal texts."""
        fields = _multipart(request.headers.get("content-type", ""), await request.body())
        if "file" not in fields:
            raise EngineError(400, "The field 'file' is missing.")
        sound = fields["file"]
        prompt = [zlib.crc32(sound[at : at + 4096]) for at in range(0, len(sound), 4096)] or [0]
        (generation,) = await compute(self._engine, [EngineJob(prompt, 48)], request.receive)
        text = generation.text.strip()
        if fields.get("response_format") == b"text":
            return PlainTextResponse(text)
        return json_response({"text": text, "usage": {"type": "tokens", **_usage([generation], written=True)}})

    async def _compute(self, request: Request, prompts: Sequence[Tokens]) -> list[EngineGeneration]:
        if not prompts:
            raise EngineError(400, "The list of inputs is empty.")
        return await compute(self._engine, [EngineJob(prompt, 0) for prompt in prompts], request.receive)

    def _model(self, body: Body) -> str:
        return str(body.get("model") or self._parser.model)


def _usage(done: Sequence[EngineGeneration], *, written: bool = False) -> dict[str, Any]:
    prompt = sum(generation.request.prompt for generation in done)
    answer = sum(generation.shown for generation in done)
    if written:
        return {"input_tokens": prompt, "output_tokens": answer, "total_tokens": prompt + answer}
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _meta(done: Sequence[EngineGeneration], index: float) -> dict[str, object]:
    request = done[int(index)].request
    return {"id": request.rid, "prompt_tokens": request.prompt, "cached_tokens": request.cached}


def _multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the parts of a multipart/form-data body by name; the standard library's mail parser reads them."""
    message = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    if not message.is_multipart():
        raise EngineError(400, "The body is not multipart/form-data.")
    fields = {}
    for part in message.iter_parts():
        payload = part.get_payload(decode=True)
        fields[str(part.get_param("name", header="content-disposition"))] = (
            payload if isinstance(payload, bytes) else b""
        )
    return fields
