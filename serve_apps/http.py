"""What the HTTP apps share: one FastAPI with error mapping, bearer token, body limit and health.

Errors become statuses in one place: bad pictures 400/413/415, missing or wrong fields 422, a judge that gave no usable
answer 502, a defect 500, never a 200 with a made-up value. Overload is Serve's own backpressure: 503 with Retry-After.

Left out: what a route does (each app's file) and decoding itself (`rlhf.data.media`).
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

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
    """What an app is given beside its config. It is never written anywhere."""

    token: str | None = None
    """Bearer token that every route asks for."""
    api_key: str | None = None
    """Key of the filter's server."""


class Health(BaseModel):
    """The answer of /health for a judge whose last forward succeeded."""

    model: str
    version: str
    device: str


class Judge(Protocol):
    """What an app must offer for `create_api`."""

    async def check_health(self) -> None: ...

    def describe(self) -> Health: ...


def create_api(title: str, judge: Judge, *, token: str | None, max_body: int) -> FastAPI:
    """A FastAPI with /health, /docs and /openapi.json; `max_body` bytes and (if set) the token guard every route."""
    # The dependency only puts the token into the documentation; `BearerToken` guards that too.
    security = [Depends(HTTPBearer(auto_error=False))] if token else []
    api = FastAPI(title=title, version="1", responses=COMMON_ERRORS, dependencies=security)
    api.add_exception_handler(RequestValidationError, _fields_missing)
    api.add_exception_handler(JudgeError, _answered(502))
    api.add_exception_handler(Refused, _answered(422))
    api.add_exception_handler(Exception, _defect)
    api.add_middleware(BodyLimit, limit=max_body)
    if token:
        api.add_middleware(BearerToken, token=token)  # added last, so it runs first

    @api.get("/health")
    async def health() -> Health:
        try:
            await judge.check_health()
        except Exception as error:
            raise HTTPException(503, f"{type(error).__name__}: {error}") from error
        return judge.describe()

    return api


async def decode_field(field: str, text: str) -> np.ndarray:
    """The picture in a base64 field, decoded off the event loop; HTTPException names the field."""
    return await _decode(field, decode_base64_image, text)


async def decode_sources(
    field: str, given: str | list[str] | None, decode: Callable[[str, str], Awaitable[np.ndarray]] = decode_field
) -> Sources:
    """The pictures of a `SourceField`, in order; HTTPException names the field and, in a list, the place."""
    if given is None:
        return ()
    texts = {field: given} if isinstance(given, str) else {f"{field}.{i}": text for i, text in enumerate(given)}
    return tuple([await decode(name, text) for name, text in texts.items()])


async def decode_upload(field: str, data: bytes) -> np.ndarray:
    """The picture in an uploaded file, decoded off the event loop; HTTPException names the field."""
    return await _decode(field, decode_image, data)


async def _decode(field: str, decode: Callable[[Any], np.ndarray], data: str | bytes) -> np.ndarray:
    try:
        return await asyncio.to_thread(decode, data)
    except ImageError as error:
        raise HTTPException(error.status, f"{field}: {error}") from error


async def _fields_missing(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if part not in ("body", "query")]
        problems.append({"field": ".".join(where) or "body", "message": problem["msg"]})
    return JSONResponse({"detail": problems}, status_code=422)


def _answered(status: int) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=status)

    return answer


async def _defect(request: Request, error: Exception) -> JSONResponse:
    # An exception's text may hold anything, so it goes to the log only.
    return JSONResponse({"detail": f"{type(error).__name__}; details are in the replica's log"}, status_code=500)


class BearerToken:
    """401 unless the request carries `Authorization: Bearer <token>`; compared in constant time."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                challenge = [(b"www-authenticate", b"Bearer")]
                return await _refuse(send, 401, "a valid bearer token is required", challenge)
        await self.app(scope, receive, send)


class BodyLimit:
    """413 for bodies over `limit` bytes, by their declared length or while they stream in."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"the request body is over {self.limit} bytes"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            return await _refuse(send, 413, message)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self.limit:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)


async def _refuse(send: Send, status: int, detail: str, headers: list[Any] | None = None) -> None:
    body = json.dumps({"detail": detail}).encode()
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
