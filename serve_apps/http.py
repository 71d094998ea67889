"""What the HTTP apps share: one FastAPI with error mapping, bearer token, body limit and health.

Errors become statuses in one place, never a 200 with a made-up value. Overload is Serve's own backpressure: 503 with
Retry-After. Left out: what a route does (each app's file) and decoding itself (`rlhf.data.media`).
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.data.media import ImageError, decode_base64_image, decode_image
from rlhf.errors import Refused
from rlhf.rewards.filters import MAX_SOURCES
from rlhf.rewards.protocols import JudgeError, Sources

EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mM8EaDBwMDAxMDAwMDAAAAPygFEi5XGRAAAAABJRU5ErkJggg=="
)
"""A 2×2 PNG in base64: the documentation's requests can be sent as they stand."""


class Problem(BaseModel):
    """What is wrong with a request, or why there is no answer."""

    detail: Any


def _documented(*statuses: tuple[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": text} for status, text in statuses}


MAX_TEXT = 10_000
"""Characters of a prompt or of an item's column: tokenizers read whatever they are given before they cut it."""

SourceField = Annotated[
    str | Annotated[list[str], Field(max_length=MAX_SOURCES)] | None,
    Field(description="the picture before the edit; a list where there are several", examples=[None]),
]
"""`source_base64`, wherever a request has it."""

COMMON_ERRORS = _documented(
    (401, "no or wrong bearer token"),
    (408, "no answer within the time limit of the server"),
    (500, "a defect, or the replica died while it worked on the request"),
    (503, "overloaded: try again after Retry-After; or the model does not answer"),
)
PICTURE_ERRORS = _documented(
    (400, "a picture that cannot be read, by its field; or a body that cannot"),
    (413, "a picture over 32 MiB or 40 megapixels, or a body over the limit"),
    (415, "not a still 8-bit PNG, JPEG or WEBP"),
    (422, "a missing or wrong field, by name"),
    (502, "the model gave no usable answer"),
)


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What an app is given beside its config and is never written anywhere."""

    token: str | None = None
    """Bearer token that every route asks for."""
    api_key: str | None = None
    """Key of the filter's server."""


class Health(BaseModel):
    """The answer of /health for a judge whose last forward succeeded."""

    model: str
    version: str
    device: str


def create_api(
    title: str, healthy: Health, check_health: Callable[[], Awaitable[None]], *, token: str | None, max_body: int
) -> FastAPI:
    """A FastAPI with /health, /docs and /openapi.json; `max_body` bytes and (if set) the token guard every route."""
    # The dependency only puts the token into the documentation, which `Guard` guards too.
    security = [Depends(HTTPBearer(auto_error=False))] if token else []
    api = FastAPI(title=title, version="1", responses=COMMON_ERRORS, dependencies=security)
    for kind in (RequestValidationError, JudgeError, Refused, Exception):
        api.add_exception_handler(kind, _answer)
    api.add_middleware(Guard, token=token, limit=max_body)

    @api.get("/health")
    async def health() -> Health:
        try:
            await check_health()
        except Exception as error:
            raise HTTPException(503, f"{type(error).__name__}: {error}") from error
        return healthy

    return api


async def decode_field(field: str, data: str | bytes) -> np.ndarray:
    """The picture in a base64 field (str) or an upload (bytes), decoded off the event loop; HTTPException names the field."""
    decode: Callable[[Any], np.ndarray] = decode_base64_image if isinstance(data, str) else decode_image
    try:
        return await asyncio.to_thread(decode, data)
    except ImageError as error:
        raise HTTPException(error.status, f"{field}: {error}") from error


async def decode_sources(
    field: str, given: str | list[str] | None, decode: Callable[[str, str], Awaitable[np.ndarray]] = decode_field
) -> Sources:
    """The pictures of a `SourceField`, in order; HTTPException names the field and, in a list, the place."""
    if given is None:
        return ()
    texts = {field: given} if isinstance(given, str) else {f"{field}.{i}": text for i, text in enumerate(given)}
    return tuple([await decode(name, text) for name, text in texts.items()])


async def _answer(request: Request, error: Exception) -> JSONResponse:
    detail: Any = str(error)
    match error:
        case RequestValidationError():
            status, detail = 422, []
            for problem in error.errors():
                where = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query"))
                detail.append({"field": where or "body", "message": problem["msg"]})
        case JudgeError():
            status = 502
        case Refused():
            status = 422
        case _:  # an exception's text may hold anything, so it goes to the log only
            status, detail = 500, f"{type(error).__name__}; details are in the replica's log"
    return JSONResponse({"detail": detail}, status)


class Guard:
    """401 without `Authorization: Bearer <token>`, compared in constant time, where a token is set; 413 for bodies over
    `limit` bytes, by their declared length or while they stream in."""

    def __init__(self, app: ASGIApp, token: str | None, limit: int) -> None:
        self.app, self.limit = app, limit
        self.expected = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.expected and not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            challenge = {"www-authenticate": "Bearer"}
            refusal = JSONResponse({"detail": "a valid bearer token is required"}, 401, challenge)
            return await refusal(scope, receive, send)
        message = f"the request body is over {self.limit} bytes"
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            return await JSONResponse({"detail": message}, 413)(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self.limit:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)
