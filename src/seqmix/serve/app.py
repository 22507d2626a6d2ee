"""The HTTP server: OpenAI's API over engines, `/health`, `/metrics`, and a page to try it from at `/`.

Every refusal is `{"error": {"message", "type", "param", "code"}}` with a 4xx status: 400 for a bad request, 401 for
a missing key, 404 for an unknown model or path, 413 for too large a body, 429 for a full queue. What goes wrong in
the middle of a stream is an event of the same form, the last one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seqmix.core.errors import RangeError, SeqmixError
from seqmix.generate import Constraint
from seqmix.serve.answers import Answers, Piece, Served
from seqmix.serve.metrics import exposition
from seqmix.serve.protocol import Body, ChatBody, CompletionBody
from seqmix.serve.reports import Reports
from seqmix.serve.request import BODY_BYTES, QueueFull

PAGE = Path(__file__).with_name("page.html")
REPORTS_LINK = '<a href="/reports">Reports and claims</a>'
ALONE = {  # a report may run its plots, and reach nothing of the server
    "Content-Security-Policy": "sandbox allow-scripts allow-top-navigation-by-user-activation"
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request is wrong; the message says where.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests wait.",
        500: "The model failed.",
    }.items()
}


def create_app(
    models: Sequence[Served],
    *,
    api_key: str | None = None,
    body_bytes: int = BODY_BYTES,
    reports: Reports | None = None,
) -> FastAPI:
    """The application; the engines run between its start and its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for served in models:
            served.engine.start()
        yield
        for served in models:
            served.engine.close()

    app = FastAPI(title="seqmix", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key, body_bytes=body_bytes)
    known = {served.name: served for served in models}
    created = int(time.time())

    def find(name: str) -> Served:
        if name not in known:
            raise HTTPException(
                404, f"There is no model {name[:100]!r}. Known: {', '.join(known)}."
            )
        return known[name]

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        names = json.dumps(list(known)).replace("<", "\\u003c")
        page = PAGE.read_text(encoding="utf-8").replace("MODELS", names, 1)
        return HTMLResponse(page.replace("LINKS", REPORTS_LINK if reports else "", 1))

    if reports is not None:

        @app.get("/reports", include_in_schema=False)
        def list_reports() -> HTMLResponse:
            return HTMLResponse(reports.index(), headers=ALONE)

        @app.get("/reports/{name:path}", include_in_schema=False)
        def report(name: str) -> HTMLResponse:
            found = reports.read(name)
            if found is None:
                raise HTTPException(404, f"There is no report {name[:100]!r}.")
            return HTMLResponse(found, headers=ALONE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(exposition(models), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def list_models() -> dict[str, Any]:
        described = [
            {"id": name, "object": "model", "created": created, "owned_by": "seqmix"}
            for name in known
        ]
        return {"object": "list", "data": described}

    @app.post("/v1/completions", responses=REFUSALS)
    async def complete(body: CompletionBody, request: Request) -> Response:
        served = find(body.model)
        prompt = body.prompt
        ids = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        answers = begin(served, ids, body, body.top, body.max_tokens or 16)
        return await respond(answers, body, request, Shape(served, "text_completion", "cmpl"))

    @app.post("/v1/chat/completions", responses=REFUSALS)
    async def chat(body: ChatBody, request: Request) -> Response:
        served = find(body.model)
        ids = conversation(served, body)
        tokens = body.max_completion_tokens or body.max_tokens
        answers = begin(served, ids, body, body.top, tokens, await constraint(served, body))
        return await respond(answers, body, request, Shape(served, "chat.completion", "chatcmpl"))

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        return refusal(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return refusal(400, f"{place or 'body'}: {first['msg']}.", param=place or None)

    @app.exception_handler(SeqmixError)
    async def wrong(_: Request, error: SeqmixError) -> Response:
        if isinstance(error, QueueFull):
            return refusal(429, str(error), headers={"Retry-After": "1"})
        return refusal(400, str(error))

    return app


def begin(
    served: Served,
    ids: Sequence[int],
    body: Body,
    top: int | None,
    max_tokens: int | None,
    constraint: Constraint | None = None,
) -> Answers:
    """Submits what a body asks for."""
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if (
            not (token.isascii() and token.isdigit())
            or int(token[:12]) >= served.engine.reader.vocabulary
        ):
            raise RangeError(f"logit_bias: {token[:20]!r} is no token of this model.")
        bias[int(token)] = value
    return Answers(
        served,
        ids,
        body,
        body.sampling(bias),
        top=top,
        max_tokens=max_tokens,
        constraint=constraint,
    )


async def constraint(served: Served, body: ChatBody) -> Constraint | None:
    """What `response_format` asks of the answers; the automaton is made beside the event loop, for it takes long."""
    language = None if body.response_format is None else body.response_format.language()
    if language is None:
        return None
    return await asyncio.to_thread(language.constraint, served.tokenizer)


def conversation(served: Served, body: ChatBody) -> list[int]:
    """The tokens of the messages, in the model's own form."""
    if not getattr(served.tokenizer, "chat_template", None):
        raise RangeError(
            f"{served.name} has no chat template, so it takes no messages. Use /v1/completions."
        )
    messages = [message.model_dump() for message in body.messages]
    try:
        text = served.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the model's and may refuse anything
        raise RangeError(f"messages: the model's chat template refuses them ({error}).") from error
    return served.tokenizer.encode(text, add_special_tokens=False)


class Shape:
    """How an answer is written down: as a completion or as a chat's message, whole or in chunks."""

    def __init__(self, served: Served, kind: str, prefix: str) -> None:
        self.served = served
        self.kind = kind
        self.is_chat = kind == "chat.completion"
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
        }

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if self.is_chat else self.kind
        return {**self.head, "object": kind, "choices": choices, **more}

    def choice(
        self, pieces: Sequence[Piece], *, with_logprobs: bool, is_chunk: bool, is_first: bool = True
    ) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {"index": pieces[0].answer, "finish_reason": pieces[-1].finish}
        choice["logprobs"] = self._logprobs(pieces) if with_logprobs else None
        if not self.is_chat:
            return choice | {"text": text}
        role = {"role": "assistant"} if is_first else {}
        return choice | {("delta" if is_chunk else "message"): {**role, "content": text}}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        events = [piece.event for piece in pieces if piece.event.token is not None]
        tokens = [self._text(event.token) for event in events]
        tops = [[(self._text(token), value) for token, value in event.top] for event in events]
        if not self.is_chat:
            return {
                "tokens": tokens,
                "token_logprobs": [event.logprob for event in events],
                "top_logprobs": [dict(top) for top in tops],
                "text_offset": [sum(map(len, tokens[:i])) for i in range(len(tokens))],
            }

        def entry(token: str, value: float) -> dict[str, Any]:
            return {"token": token, "logprob": value, "bytes": list(token.encode())}

        return {
            "content": [
                {**entry(token, event.logprob), "top_logprobs": [entry(*pair) for pair in top]}
                for token, event, top in zip(tokens, events, tops, strict=True)
            ]
        }

    def _text(self, token: int | None) -> str:
        return self.served.tokenizer.decode([token])


async def respond(answers: Answers, body: Body, request: Request, shape: Shape) -> Response:
    """The whole answer, or a stream of server-sent events."""
    with_logprobs = answers.request.top_logprobs is not None
    if body.stream:
        stream = _stream(answers, body, shape, with_logprobs)
        return StreamingResponse(stream, media_type="text/event-stream")
    reading = asyncio.create_task(_collect(answers))
    leaving = asyncio.ensure_future(
        request.receive()
    )  # the body is read: what comes is a disconnect
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=499)
        pieces = reading.result()
    finally:
        reading.cancel()
        leaving.cancel()
    failed = next((piece for piece in pieces if piece.finish == "error"), None)
    if failed is not None:
        return failure(failed)
    each = [[p for p in pieces if p.answer == i] for i in range(answers.request.answers)]
    choices = [shape.choice(p, with_logprobs=with_logprobs, is_chunk=False) for p in each]
    return JSONResponse(shape.whole(choices, answers.usage))


async def _collect(answers: Answers) -> list[Piece]:
    return [piece async for piece in answers.pieces()]


async def _stream(
    answers: Answers, body: Body, shape: Shape, with_logprobs: bool
) -> AsyncIterator[str]:
    begun: set[int] = set()
    pieces = answers.pieces()
    try:
        async for piece in pieces:
            if piece.finish == "error":
                yield f"data: {bytes(failure(piece).body).decode()}\n\n"
                return
            if not (piece.text or piece.finish or with_logprobs):
                continue
            is_first = piece.answer not in begun
            begun.add(piece.answer)
            choice = shape.choice(
                [piece], with_logprobs=with_logprobs, is_chunk=True, is_first=is_first
            )
            yield _event(shape.chunk([choice]))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(shape.chunk([], usage=answers.usage))
        yield "data: [DONE]\n\n"
    finally:
        answers.request.stop()  # the client may have left


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def refusal(
    status: int, message: str, *, param: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def failure(piece: Piece) -> JSONResponse:
    """The error with which an answer ended."""
    if piece.event.reason is not None:
        return refusal(400, piece.event.reason)
    return refusal(500, "The model failed while it answered.")


class Guard:
    """Refuses requests without the key, and bodies that are too large, before anything reads them."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, body_bytes: int) -> None:
        self.app = app
        self.key = None if api_key is None else f"Bearer {api_key}".encode()
        self.body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        needs_key = self.key is not None and scope["path"].startswith("/v1")
        if needs_key and not hmac.compare_digest(given, self.key or b""):
            await refusal(401, "The API key is missing or wrong.")(scope, receive, send)
            return
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and (len(size) > 15 or int(size) > self.body_bytes):
            await refusal(413, self._too_large())(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> str:
        return f"The body is larger than {self.body_bytes} bytes."
