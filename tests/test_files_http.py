"""A judge's server may be hostile: each reply ends in time and within some bytes, and nobody is sent elsewhere."""

import datetime
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from models import preflight
from models.errors import NoVerdict
from models.judges import llm
from models.judges.llm import Llm
from models.judges.protocol import AnsweredPrompt
from models.judges.score_cache import ScoreCache
from models.preflight import problems
from models.recipe import Judge, Judges

Behaves = Callable[[socket.socket], None]
"""What a server does with a connection, once it has read a request."""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
PAIRS = [(AnsweredPrompt("q", "a"), "b")]


class Server:
    """A server on loopback that reads requests, and then does what it likes."""

    def __init__(self, behaves: Behaves, tls: ssl.SSLContext | None = None) -> None:
        self.behaves, self.tls = behaves, tls
        self.requests: list[bytes] = []
        self.connections = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            speaks = self.tls.wrap_socket(connection, server_side=True) if self.tls else connection
            self.connections += 1
            while request := self._request(speaks):
                self.requests.append(request)
                self.behaves(speaks)
            speaks.close()

    def _request(self, connection: socket.socket) -> bytes:
        request = connection.recv(2**20)
        head, _, body = request.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += connection.recv(2**20)
        return request and head + b"\r\n\r\n" + body


@pytest.fixture
def server() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def starting(behaves: Behaves, tls: ssl.SSLContext | None = None) -> Server:
        started.append(Server(behaves, tls))
        return started[-1]

    yield starting
    for one in started:
        one.socket.close()


def judge(url: str, folder: Path, **settings: object) -> Llm:
    fields = {"kind": "llm", "model": "m", "base_url": url, "retries": 0, "timeout": 10} | settings
    return Llm(Judge.model_validate(fields), "helpful", ScoreCache(folder / "verdicts.db", "judge 1"))


def replies(connection: socket.socket) -> None:
    """Send a whole reply, which is no verdict."""
    message = {"index": 0, "message": {"role": "assistant", "content": "prose"}}
    body = json.dumps({"choices": [message]}).encode()
    connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)


def drips(start: bytes, drop: bytes) -> Behaves:
    """Send `start`, then a drop now and then, for as long as somebody listens, at most ten seconds."""

    def behaves(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(200):
            time.sleep(0.05)
            connection.sendall(drop)

    return behaves


ENDLESS = {
    "body": drips(HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "header": drips(HEAD + b"x: ", b"y"),
    "headers": drips(HEAD, b"x: y\r\n"),
    "status": drips(b"HTTP/1.1 200 ", b"O"),
    "one more moment": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_the_timeout_is_for_the_whole_reply(name: str, server: Callable[..., Server], tmp_path: Path) -> None:
    """Each byte came in time; the reply never did."""
    started = time.monotonic()
    (row,) = judge(server(ENDLESS[name]).url, tmp_path, timeout=0.3).compare(PAIRS)
    assert "APITimeoutError" in row.failed and time.monotonic() - started < 8


def test_a_reply_that_is_late_is_asked_for_again(server: Callable[..., Server], tmp_path: Path) -> None:
    slow = server(ENDLESS["body"])
    (row,) = judge(slow.url, tmp_path, timeout=0.3, retries=1).compare(PAIRS)
    assert "APITimeoutError" in row.failed and len(slow.requests) > 2


def test_a_reply_of_many_bytes_is_not_read(server: Callable[..., Server], tmp_path: Path) -> None:
    sent = [0]

    def behaves(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(256):
            connection.sendall(b"%x\r\n" % 2**20 + b"a" * 2**20 + b"\r\n")
            sent[0] += 2**20

    giant = server(behaves)
    (row,) = judge(giant.url, tmp_path, retries=3, at_once=1).compare(PAIRS)
    assert f"longer than {llm.LARGEST + 512 * llm.PER_TOKEN:,} bytes" in row.failed
    assert sent[0] < 2 * 32 * 2**20 and len(giant.requests) == 2  # one for each order: not asked again


def test_a_packed_reply_is_not_unpacked(server: Callable[..., Server], tmp_path: Path) -> None:
    """A few MiB may hold some GiB; nobody asked for it."""
    packed = server(
        lambda connection: connection.sendall(HEAD + b"content-encoding: gzip\r\ncontent-length: 9\r\n\r\n")
    )
    (row,) = judge(packed.url, tmp_path).compare(PAIRS)
    assert "packed (gzip)" in row.failed and b"accept-encoding: identity" in packed.requests[0].lower()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, server: Callable[..., Server], tmp_path: Path) -> None:
    """Prompts and answers go to the address that the recipe names, and a reply from elsewhere counts nothing."""
    elsewhere = server(replies)
    location = f"HTTP/1.1 {status} Moved\r\nlocation: {elsewhere.url}/chat/completions\r\ncontent-length: 0\r\n\r\n"
    away = server(lambda connection: connection.sendall(location.encode()))
    with pytest.raises(NoVerdict) as raised:
        list(judge(away.url, tmp_path).compare(PAIRS))
    assert str(raised.value) == (
        f"evaluation.judges.helpful.base_url: {away.url} sends us to another address, which is not followed; give the "
        "address itself, the same command goes on"
    )
    assert elsewhere.requests == []


def test_connections_are_kept(server: Callable[..., Server], tmp_path: Path) -> None:
    good = server(replies)
    asked = [(AnsweredPrompt(f"q {i}", "a"), "b") for i in range(4)]
    rows = list(judge(good.url, tmp_path, at_once=2).compare(asked))
    assert all("unreadable reply: 'prose'" in row.failed for row in rows)
    assert len(good.requests) == 8 and good.connections <= 2


def test_a_proxy_of_the_environment_is_asked(
    server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for behaves, seconds, why in ((replies, 10, "prose"), (ENDLESS["headers"], 0.3, "APITimeoutError")):
        proxy = server(behaves)
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        (row,) = judge("http://judge.invalid/v1", tmp_path, timeout=seconds).compare(PAIRS)
        assert why in row.failed and proxy.requests[0].startswith(b"POST http://judge.invalid/v1/chat/completions")


def test_the_same_over_tls(server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    (row,) = judge(server(replies, tls).url, tmp_path).compare(PAIRS)
    assert "prose" in row.failed
    (row,) = judge(server(ENDLESS["headers"], tls).url, tmp_path, timeout=1).compare(PAIRS)
    assert "APITimeoutError" in row.failed


def certificate(folder: Path) -> ssl.SSLContext:
    """Write a certificate of 127.0.0.1, signed by itself, and return what serves with it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "judge")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@pytest.mark.parametrize("name", ENDLESS)
def test_the_look_at_an_address_ends(name: str, server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that answers its headers in time is there, however long its list of models is."""
    monkeypatch.setattr(preflight, "ASKED_FOR", 8 if name == "body" else 0.3)
    started = time.monotonic()
    harmless = Judge(kind="llm", model="m", threshold=6, base_url=server(ENDLESS[name]).url)
    found = problems(Judges(harmless=harmless))
    assert bool(found) is (name != "body") and time.monotonic() - started < 8
    assert all("nobody answers there as HTTP" in problem for problem in found)
