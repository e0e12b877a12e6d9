"""An HTTP client for servers of others: it follows no redirect, and each reply ends in time and within some bytes.

httpx's timeout is for one read; a server that sends a byte now and then never exceeds it. So time and bytes are counted
in the connection, for all that the server sends: headers, a body, or one `100 Continue` after the other. Compressed
replies are refused, since a few bytes may expand to many.
"""

import ssl
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import httpcore2
import httpx2

if TYPE_CHECKING:
    from httpcore2 import SOCKET_OPTION


class Redirected(Exception):
    """The server sends us to another address."""


class TooMuch(Exception):
    """The reply is larger than it may be, or packed."""


class _Budget(threading.local):
    """What the request of this thread may still take.

    A client is shared by threads. The thread that sends a request also reads its reply, so one budget per thread
    belongs to one request.
    """

    until = 0.0
    """Time of `time.monotonic` at which the reply must have ended."""
    bytes = largest = 0

    def seconds(self) -> float:
        """Return the seconds that remain.

        Raises:
            httpcore2.ReadTimeout: none remain.
        """
        seconds = self.until - time.monotonic()
        if seconds <= 0:
            raise httpcore2.ReadTimeout("the reply did not end in time")
        return seconds


class _Stream(httpcore2.NetworkStream):
    """A connection that counts what it reads."""

    def __init__(self, stream: httpcore2.NetworkStream, budget: _Budget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        # httpx's own timeout is ignored: it starts anew with each read, the budget does not
        content = self._stream.read(max_bytes, self._budget.seconds())
        self._budget.bytes -= len(content)
        if self._budget.bytes < 0:
            raise TooMuch(f"the reply is longer than {self._budget.largest:,} bytes")
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._budget.seconds())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._budget.seconds()), self._budget)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Network(httpcore2.NetworkBackend):
    """Opens connections that count what they read."""

    def __init__(self, network: httpcore2.NetworkBackend, budget: _Budget) -> None:
        self._network, self._budget = network, budget

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: "Iterable[SOCKET_OPTION] | None" = None,
    ) -> _Stream:
        stream = self._network.connect_tcp(host, port, self._budget.seconds(), local_address, socket_options)
        return _Stream(stream, self._budget)


def client(seconds: float, largest: int) -> httpx2.Client:
    """Return a client whose replies are bounded.

    Its calls raise httpx's own errors (`ReadTimeout` for a reply that did not end in time), and besides `Redirected`
    and `TooMuch`. These two are no errors of httpx, so that a caller who tries again after httpx's errors does not try
    again after them.

    Args:
        seconds: from the request to the end of the reply.
        largest: bytes of a reply, its headers included.
    """
    budget = _Budget()

    def begin(request: httpx2.Request) -> None:
        budget.until, budget.bytes, budget.largest = time.monotonic() + seconds, largest, largest

    bounded = httpx2.Client(
        timeout=seconds,
        limits=httpx2.Limits(),  # no limit on connections: the caller decides how many requests are in flight
        headers={"accept-encoding": "identity"},
        follow_redirects=False,
        event_hooks={"request": [begin], "response": [_refuse_redirect_and_packing]},
    )
    # httpx builds one transport per proxy from the environment. A transport of our own would replace them all, so the
    # network below each is exchanged instead, through private attributes
    for transport in (bounded._transport, *bounded._mounts.values()):
        if isinstance(transport, httpx2.HTTPTransport):
            transport._pool._network_backend = _Network(transport._pool._network_backend, budget)
    return bounded


def _refuse_redirect_and_packing(reply: httpx2.Response) -> None:
    if 300 <= reply.status_code < 400:
        raise Redirected(f"status {reply.status_code} sends us to another address, which is not followed")
    packing = reply.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise TooMuch(f"the reply is packed ({packing[:20]}), which the request ruled out")
