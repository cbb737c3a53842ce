"""Bounds on what a client may send and how long it may take, below the routes."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Bodies of the largest size that are held at a time, over all requests.
_BODIES = 16
# For how long the rest of a body is read that is not wanted: else the system resets the connection,
# and the client never sees why.
_LINGER_SECONDS = 2.0
RETRY_AFTER = {"Retry-After": "1"}

HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Refusal(HTTPException):
    """The reason that a request is not answered, in one line: the value, the rule, the way out."""


class Limits:
    """An ASGI application around another, which bounds the bodies of requests.

    Every answer has `HEADERS`, where it has none of that name.

    Args:
        app: gets a `Refusal` where it reads beyond a bound.
        max_bytes: of a body.
        seconds: for a body to arrive.
        answered: is called after each request with its path, status (0: none) and seconds.
    """

    def __init__(
        self,
        app: App,
        *,
        max_bytes: int,
        seconds: float,
        answered: Callable[[str, int, float], None],
    ):
        self._app = app
        self._answered = answered
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        body = _Body(self, scope, receive, send)
        try:
            await self._app(scope, body.receive, body.send)
        finally:
            self.held -= body.size
            self._answered(scope["path"], body.status, time.monotonic() - start)

    def take(self, count: int) -> None:
        """Counts bytes of a body among those that are held.

        Raises:
            Refusal: there is no memory for them now.
        """
        if self.held + count > _BODIES * self.max_bytes:
            raise Refusal(503, "too many uploads at a time: try again in a second", RETRY_AFTER)
        self.held += count


class _Body:
    """The body of a request as it arrives, and the answer to it.

    Attributes:
        size: bytes that have arrived.
        status: of the answer, 0 before it.
    """

    def __init__(
        self, limits: Limits, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ):
        headers = dict(scope["headers"])
        # h11 lets no other through.
        self._length = int(headers.get(b"content-length", b"0") or 0)
        self._whole = not self._length and b"transfer-encoding" not in headers
        self._limits = limits
        self._receive = receive
        self._send = send
        self._deadline: float | None = None
        self.size = 0
        self.status = 0

    async def receive(self) -> Message:
        """The next part of the body; then, whenever it may be, that the client has gone."""
        if self._whole:
            return await self._receive()
        limits = self._limits
        if max(self._length, self.size) > limits.max_bytes:
            raise self._too_large()
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + limits.seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(
                408,
                f"the body was not complete after {limits.seconds:g} s ({self.size:,} bytes): send "
                "a smaller image, or start the server with a larger --upload_seconds",
            ) from None
        count = len(message.get("body", b""))
        limits.take(count)
        self.size += count
        if self.size > limits.max_bytes:
            raise self._too_large()
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Sends a part of the answer; before the last one the rest of the body is read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = self._with_headers(message.get("headers", []))
        elif not self._whole and not message.get("more_body", False):
            # With it the answer is complete, and so the client can read it.
            await self._send({**message, "more_body": True})
            await self._discard()
            message = {**message, "body": b""}
        await self._send(message)

    def _with_headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        names = {name.lower() for name, _ in headers}
        ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        if not self._whole:
            ours.append((b"connection", b"close"))
        return [*headers, *((name, value) for name, value in ours if name not in names)]

    async def _discard(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self._whole:
                    self._whole = not (await self._receive()).get("more_body", False)

    def _too_large(self) -> Refusal:
        size = f"{self._length:,}" if self._length else f"more than {self._limits.max_bytes:,}"
        return Refusal(
            413,
            f"the body has {size} bytes, and at most {self._limits.max_bytes:,} are taken: make "
            "the image smaller, or start the server with a larger --max_bytes",
        )
