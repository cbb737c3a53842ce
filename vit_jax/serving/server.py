"""The socket, and uvicorn on it: connections bounded in time, and an end that loses nothing."""

import asyncio
import contextlib
import errno
import json
import signal
import socket
from collections.abc import Generator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vit_jax import signals
from vit_jax.errors import UserError, first_line
from vit_jax.printable import printable
from vit_jax.serving.limits import HEADERS

# For the line and the headers of a request to arrive.
HEAD_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 20
# Connections at a time. Most systems allow a process 1,024 files.
_CONNECTIONS = 800
# For what was accepted to be answered after a signal, beyond the time of an upload.
_GRACE_SECONDS = 30


def bind(host: str, port: int) -> socket.socket:
    """Takes a port.

    Args:
        host: a name or an address of this machine.
        port: 0 for one that is free.

    Raises:
        UserError: it is taken, or cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or first_line(error)
        way_out = "name a host of this machine, such as 127.0.0.1 or 0.0.0.0"
        if error.errno == errno.EADDRINUSE:
            way_out = "end what has it, or choose another --port; 0 takes a free one"
        elif error.errno == errno.EACCES:
            way_out = "choose a --port of 1024 or more"
        where = f"--host {host} --port {port}"
        raise UserError(f"{where} cannot be had ({reason}): {way_out}") from error


def url(listening: socket.socket) -> str:
    """The address of a socket, for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Any, listening: socket.socket, upload_seconds: float) -> None:
    """Serves an application until SIGTERM or Ctrl-C, then answers what has been accepted.

    Args:
        app: in ASGI.
        listening: from `bind`; is closed.
        upload_seconds: how long a body may take, which is waited for in the end.
    """
    server = make_server(app, upload_seconds)

    def stop() -> None:
        server.should_exit = True

    with signals.catching(signal.SIGINT, signal.SIGTERM) as caught, caught.held(stop):
        server.run(sockets=[listening])


def make_server(app: Any, upload_seconds: float) -> uvicorn.Server:
    """Makes the server of an application, which runs until its `should_exit` is set.

    Args:
        app: in ASGI.
        upload_seconds: see `serve`.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(upload_seconds) + _GRACE_SECONDS,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """A server that leaves signals to the command, and says that it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        signals.told()
        count = len(self.server_state.tasks)
        print(f"ends, {count} requests in work are answered first" if count else "ends", flush=True)
        await super().shutdown(sockets)


class Protocol(H11Protocol):
    """A connection whose requests must begin in time, and whose junk is answered in JSON."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Waits for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Takes what has come; a head that has begun must end in time as well."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._watch()
        else:
            self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._unwatch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, where an answer has not begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = f"{msg.rstrip('.')}: send HTTP/1.1, with headers of at most 64 KiB"
            body = json.dumps({"error": printable(error)}).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **HEADERS,
            }
            reply = h11.Response(status_code=400, headers=list(headers.items()), reason=b"")
            for event in (reply, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
