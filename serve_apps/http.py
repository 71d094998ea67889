"""What the three HTTP apps share: one FastAPI with error mapping, bearer token, body limit and health.

Errors become statuses in one place: bad pictures 400/413/415, missing or wrong fields 422, a judge that gave no usable
answer 502, never a 200 with a made-up value. Overload is Serve's own backpressure: 503 with Retry-After.

Left out: what a route does (each app's file) and decoding itself (`rlhf.rewards.images`).
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.rewards.images import ImageError, decode_base64_image, decode_image
from rlhf.rewards.reward import JudgeError


class Health(BaseModel):
    """What /health says of a judge that has just done a real forward."""

    model: str
    version: str
    device: str


class Judge(Protocol):
    """What an app must offer for `create_api`."""

    async def check_health(self) -> None: ...

    def describe(self) -> Health: ...


def create_api(title: str, judge: Judge, *, token: str | None, max_body: int) -> FastAPI:
    """A FastAPI with /health, /docs and /openapi.json; `max_body` bytes and (if set) the token guard every route."""
    api = FastAPI(title=title, version="1", responses={401: {"description": "no or wrong bearer token"}})
    api.add_exception_handler(RequestValidationError, _fields_missing)
    api.add_exception_handler(JudgeError, _answered(502))
    api.add_exception_handler(ValueError, _answered(422))
    api.add_middleware(BodyLimit, limit=max_body)
    if token:
        api.add_middleware(BearerToken, token=token)  # added last, so it runs first

    @api.get("/health", responses={503: {"description": "the model does not answer"}})
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
