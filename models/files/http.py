"""An HTTP client for servers of others: it follows no redirect, and each reply ends in time and within some bytes.

httpx's timeout is for one read, which a server meets that sends a byte now and then. So time and bytes are counted in
the connection, for whatever comes: headers, a body, or one `100 Continue` after the other. Nothing packed is read,
since a few bytes may stand for many.
"""

import ssl
import threading
import time
from typing import Any

import httpcore2
import httpx2


class Redirected(Exception):
    """The server sends us to another address."""


class TooMuch(Exception):
    """The reply is larger than it may be, or packed."""


class _Left(threading.local):
    """What the request of this thread may still take: who asks also reads the reply."""

    until = 0.0
    bytes = largest = 0

    def seconds(self) -> float:
        """Return the seconds that are left.

        Raises:
            httpcore2.ReadTimeout: none are.
        """
        seconds = self.until - time.monotonic()
        if seconds <= 0:
            raise httpcore2.ReadTimeout("the reply did not end in time")
        return seconds


class _Stream(httpcore2.NetworkStream):
    """A connection that counts what it reads."""

    def __init__(self, stream: httpcore2.NetworkStream, left: _Left) -> None:
        self._stream, self._left = stream, left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        content = self._stream.read(max_bytes, self._left.seconds())
        self._left.bytes -= len(content)
        if self._left.bytes < 0:
            raise TooMuch(f"the reply is longer than {self._left.largest:,} bytes")
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._left.seconds())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._left.seconds()), self._left)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Network(httpcore2.NetworkBackend):
    """Opens such connections."""

    def __init__(self, network: httpcore2.NetworkBackend, left: _Left) -> None:
        self._network, self._left = network, left

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *more: Any, **also: Any) -> _Stream:
        return _Stream(self._network.connect_tcp(host, port, self._left.seconds(), *more, **also), self._left)


def client(seconds: float, largest: int) -> httpx2.Client:
    """Return a client whose replies, from the request on, take no longer than this, and no more bytes.

    Its calls raise, besides httpx's own errors (`ReadTimeout` for a reply that did not end in time), `Redirected` and
    `TooMuch`, which no caller that asks again after httpx's errors takes for one of them.
    """
    left = _Left()

    def begin(request: httpx2.Request) -> None:
        left.until, left.bytes, left.largest = time.monotonic() + seconds, largest, largest

    made = httpx2.Client(
        timeout=seconds,
        limits=httpx2.Limits(),  # whoever asks knows how many requests are in flight
        headers={"accept-encoding": "identity"},
        follow_redirects=False,
        event_hooks={"request": [begin], "response": [_as_asked]},
    )
    for transport in (made._transport, *made._mounts.values()):  # a transport given instead would know no proxies
        if isinstance(transport, httpx2.HTTPTransport):
            transport._pool._network_backend = _Network(transport._pool._network_backend, left)
    return made


def _as_asked(reply: httpx2.Response) -> None:
    if 300 <= reply.status_code < 400:
        raise Redirected(f"status {reply.status_code} sends us to another address, which is not followed")
    packing = reply.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise TooMuch(f"the reply is packed ({packing[:20]}), which nobody asked for")
