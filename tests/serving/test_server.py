"""The server on a socket: slow, broken and hostile clients, and an end that loses no request."""

import contextlib
import http.client
import json
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vit_jax.errors import UserError
from vit_jax.serving import __main__

from . import tiny

pytest.importorskip("fastapi", reason="needs the serve extra: pip install '.[serve]'")
from vit_jax.serving import server
from vit_jax.serving.app import Options, create_app
from vit_jax.serving.served import load

IMAGE = tiny.encode(tiny.pixels(0))


class Answer:
    """An answer as the tests of the routes have it."""

    def __init__(self, status, text):
        self.status_code = status
        self.text = text

    def json(self):
        return json.loads(self.text)


def post(port, content=IMAGE, path="/predict"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, content, {"Content-Type": "image/png"})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read().decode())


@pytest.fixture
def port(folder, monkeypatch):
    """A server in this process that waits for a body for a second, and for a head for one."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
    options = Options(max_bytes=200_000, upload_seconds=1.0)
    listening = server.bind("127.0.0.1", 0)
    running = server.make_server(create_app(load(folder), options), options.upload_seconds)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    port = listening.getsockname()[1]
    yield port
    tiny.check(post(port), tiny.pixels(0))  # Whatever came, the next one is answered.
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@contextlib.contextmanager
def connect(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        yield client


def receive(client):
    """All that comes until the server closes: status, headers and body."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            data += part
    head, _, body = data.decode().partition("\r\n\r\n")
    status = int(head.split()[1]) if head else 0
    return status, head.lower(), body


def head(length, *more, line="POST /predict HTTP/1.1"):
    lines = [line, "Host: here", "Content-Type: image/png", *more]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("declared", [True, False])
def test_who_sends_a_large_body_to_its_end_still_reads_why_it_is_refused(port, declared):
    body = b"x" * 5_000_000
    with connect(port) as client:
        if declared:
            client.sendall(head(len(body)) + body)
        else:
            client.sendall(head(None, "Transfer-Encoding: chunked"))
            client.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        status, headers, text = receive(client)
    assert status == 413 and "connection: close" in headers
    assert "at most 200,000 are taken" in json.loads(text)["error"]


def test_a_body_of_100_mb_is_refused_before_it_comes(port):
    with connect(port) as client:
        client.sendall(head(100_000_000, "Expect: 100-continue"))
        client.settimeout(10)
        first = client.recv(65536).decode()
    assert first.startswith("HTTP/1.1 413 ") and "100,000,000 bytes" in first


def test_a_slow_upload_is_ended(port):
    start = time.monotonic()
    with connect(port) as client:
        client.sendall(head(len(IMAGE)) + IMAGE[:10])
        status, _, text = receive(client)
    assert status == 408 and "was not complete after 1 s (10 bytes)" in json.loads(text)["error"]
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: he"])
def test_a_connection_that_asks_nothing_is_closed(port, sent):
    with connect(port) as client:
        client.sendall(sent)
        assert receive(client) == (0, "", "")


def test_a_slow_second_request_is_closed_as_well(port):
    with connect(port) as client:
        client.sendall(head(len(IMAGE)) + IMAGE)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"POST /pre")
        while client.recv(65536):
            pass


def test_a_cut_connection_is_nobody_elses(port):
    for sent in (head(len(IMAGE)) + IMAGE[:20], head(len(IMAGE)) + IMAGE):
        with connect(port) as client:
            client.sendall(sent)
    text = ""
    while 'path="/predict",status="499"' not in text:
        text = get(port, "/metrics")
        time.sleep(0.05)


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


JUNK = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\n: here\r\n\r\n",
    "a header of control characters": b"GET / HTTP/1.1\r\nHost: here\r\nA: \x00\x1b[2J\r\n\r\n",
    "large headers": b"GET / HTTP/1.1\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    "two lengths": head(5, "Content-Length: 6") + b"hello!",
    "a length of letters": head("abc"),
    "a negative length": head(-5),
    "junk in parts": head(None, "Transfer-Encoding: chunked") + b"zz\r\nhello\r\n",
    "a path of spaces": b"GET / / / HTTP/1.1\r\nHost: here\r\n\r\n",
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_answered_in_json(port, name, capfd):
    with connect(port) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(JUNK[name])
        status, headers, text = receive(client)
    if name != "large headers":  # Those of the server may be gone before they are read.
        assert status == 400 and "content-type: application/json" in headers
        assert json.loads(text)["error"].isprintable()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/../../etc/passwd", "//etc/passwd", "/%2e%2e/x", "/.%00", "*"])
def test_paths_lead_nowhere(port, path):
    with connect(port) as client:
        client.sendall(head(None, "Connection: close", line=f"GET {path} HTTP/1.1"))
        status, _, text = receive(client)
    assert status == 404 and "is not here" in json.loads(text)["error"]


def test_a_taken_port_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {number} cannot be had .*0 takes a free one"):
            __main__.main(["--model", str(folder), "--port", str(number)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "'70000' is not a whole number from 0 to 65535"),
        (["--max_delay_ms", "soon"], "'soon' is not a number from 0 to 10000"),
        (["--upload_seconds", "nan"], "'nan' is not a number from 0.1 to 3600"),
        (["--max_batch", "0"], "'0' is not a whole number of at least 1"),
        (["--host", "no.such.host.invalid"], "name a host of this machine"),
        (["--device", "gpu"], "use cpu, cuda or tensorrt"),
    ],
)
def test_a_wrong_flag_is_one_line(folder, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        __main__.main(["--model", str(folder), "--port", "0", *flags])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda x: x.name)
def test_a_signal_loses_no_request(start, folder, number):
    # They all wait for the batch, which is not full, when the signal comes.
    flags = ["--port", "0", "--max_batch", "64", "--max_delay_ms", "4000"]
    process = start([sys.executable, "-m", "vit_jax", "serve", "--model", str(folder), *flags])
    port, lines = None, []
    while port is None:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
        port = re.match(r"listening on http://127\.0\.0\.1:(\d+)$", lines[-1])
    port = int(port[1])
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(post, port, tiny.encode(tiny.pixels(i))) for i in range(6)]
        while "vit_jax_images_in_work 6.0" not in get(port, "/metrics"):
            time.sleep(0.02)
        process.send_signal(number)
        for seed, answer in enumerate(answers):
            tiny.check(answer.result(), tiny.pixels(seed))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output == "ends, 6 requests in work are answered first\n"
    with pytest.raises(ConnectionRefusedError):
        post(port)
