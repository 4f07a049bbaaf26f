"""The lab's nginx configuration in front of the service: what the service leaves to a proxy, the proxy does.

The file is used as it stands, but for ports, certificate and seconds.
"""

import json
import re
import socket
import ssl
import subprocess
import time
from contextlib import ExitStack, closing, contextmanager

import httpx
import pytest
from serving_tools import LIMITS, direct, distributed, listening, make_engine, metric, wait_until

from common.course.settings import ROOT
from common.engines.processes import free_port
from common.serving.api import Limits

EXAMPLE = (ROOT / "03-Model_Compression" / "Lab-3.1-Quantization" / "proxy" / "nginx.conf").read_text("utf-8")
NAME = "llm.example.org"
SECONDS = {
    "client_header_timeout 10s": "client_header_timeout 1s",
    "client_body_timeout   10s": "client_body_timeout 1s",
}
SECONDS |= {"keepalive_timeout     15s": "keepalive_timeout 1s"}


@pytest.fixture(scope="module")
def nginx():
    return distributed("nginx", "nginx")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for the example's name, of our own making."""
    folder = tmp_path_factory.mktemp("certificate")
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={NAME}"
    command += f" -addext subjectAltName=DNS:{NAME} -keyout llm.key -out llm.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


def changed(changes: dict[str, str]) -> str:
    """The example with these replacements, each of which must be there to replace."""
    text = EXAMPLE
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


class Proxy:
    """How clients reach the service by its name, through nginx on a port of the loopback."""

    def __init__(self, port: int, certificate):
        self.port = port
        self.context = ssl.create_default_context(cafile=certificate / "llm.pem")
        self.client = httpx.Client(
            base_url=f"https://127.0.0.1:{port}",
            verify=self.context,
            headers={"Host": NAME},
            timeout=30,
            trust_env=False,
        )

    def connect(self, sent: bytes = b"", name: str = NAME) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection = self.context.wrap_socket(plain, server_hostname=name)
        connection.sendall(sent)
        return connection

    def post(self, path="/v1/completions", **body):
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "temperature": 0} | body
        return self.client.build_request("POST", path, json=body, extensions={"sni_hostname": NAME})

    def get(self, path):
        return self.client.get(path, extensions={"sni_hostname": NAME})


@contextmanager
def in_front_of(url, nginx, certificate, folder, changes=()):
    """nginx with the example's configuration in front of the service at `url`."""
    port = free_port()
    example = changed(
        {
            "listen 443": f"listen 127.0.0.1:{port}",
            "/etc/ssl/": f"{certificate}/",
            "http://127.0.0.1:8080": url,
            **dict(changes),
        }
    )
    temporary = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors; events {{}}\n"
    (folder / "nginx.conf").write_text(f"{main}http {{ access_log off; {temporary}\n{example}\n}}\n", "utf-8")
    command = [nginx, "-p", folder, "-e", folder / "errors", "-c", folder / "nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    proxy = Proxy(port, certificate)
    try:
        wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 10)
        with proxy.client:
            yield proxy
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def proxy(llama, tokenizer, nginx, certificate, tmp_path):
    with (
        listening(make_engine(llama, tokenizer)) as url,
        in_front_of(url, nginx, certificate, tmp_path, SECONDS) as proxy,
    ):
        proxy.service = url
        yield proxy


def until_cut(connection: socket.socket) -> float:
    """Seconds until the other side ends this connection; what it says before is read away."""
    start = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    return time.monotonic() - start


def test_answers_pass_and_nothing_else_does(proxy, llama, tokenizer):
    answer = proxy.client.send(proxy.post())
    assert answer.json()["choices"][0]["text"] == direct(llama, tokenizer, "hello", 20)
    assert "nginx/" not in answer.headers["server"]  # no version
    assert proxy.get("/v1/models").status_code == 200
    for path in ("/metrics", "/health/ready", "/docs", "/", "/v1/../metrics", "/v1/%2e%2e/metrics", "//metrics"):
        assert proxy.get(path).status_code == 404, path
    assert httpx.get(f"{proxy.service}/metrics").status_code == 200


def test_who_does_not_ask_for_the_name_gets_nothing(proxy):
    with pytest.raises(ssl.SSLError):
        proxy.connect(name="127.0.0.1")


def test_streams_pass_at_once(llama, tokenizer, nginx, certificate, tmp_path):
    """Twenty tokens, each taking 30 ms at least. Planted: with nginx's buffers they arrive together at the end."""
    with listening(make_engine(llama, tokenizer, delay=0.03)) as url:
        for changes, apart in (((), True), ((("proxy_buffering off", "proxy_buffering on"),), False)):
            with in_front_of(url, nginx, certificate, tmp_path, changes) as proxy:
                request, arrivals, data = proxy.post(stream=True), [], []
                answer = proxy.client.send(request, stream=True)
                with closing(answer):
                    for line in answer.iter_lines():
                        if line:
                            arrivals.append(time.monotonic())
                            data.append(line.removeprefix("data: "))
                assert data[-1] == "[DONE]"
                text = "".join(json.loads(event)["choices"][0]["text"] for event in data[:-1])
                assert text == direct(llama, tokenizer, "hello", 20)
                assert (arrivals[-1] - arrivals[0] > 0.3) == apart


def test_a_client_that_leaves_the_proxy_frees_its_slot(llama, tokenizer, nginx, certificate, tmp_path):
    with ExitStack() as stack:
        url = stack.enter_context(listening(make_engine(llama, tokenizer, delay=0.05)))
        proxy = stack.enter_context(in_front_of(url, nginx, certificate, tmp_path))
        with closing(proxy.client.send(proxy.post(stream=True, max_tokens=120), stream=True)):
            wait_until(lambda: metric(url, "llm_generated_tokens_total") > 0, 5)
            assert metric(url, "llm_requests_running") == 1
        wait_until(lambda: metric(url, "llm_requests_running") == 0, 3)


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: {NAME}\r\n".encode()


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (HEAD, b""),
        (HEAD, b"X"),  # Slowloris: the time is for the whole header, not from byte to byte
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b""),
        (f"GET /v1/models HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode(), b""),  # answered, then idle
    ],
)
def test_slow_and_idle_connections_are_cut_and_the_service_sees_none_of_them(proxy, sent, drip):
    before = metric(proxy.service, "llm_requests_total", path="/v1/completions")
    with proxy.connect(sent) as connection:
        start = time.monotonic()
        connection.settimeout(0.2 if drip else 10)
        while drip and time.monotonic() - start < 5:
            try:
                connection.sendall(drip)
                if not connection.recv(100):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        until_cut(connection)
        assert 0.3 < time.monotonic() - start < 4
    assert metric(proxy.service, "llm_requests_total", path="/v1/completions") == before


def test_a_handshake_that_does_not_come_is_cut(proxy):
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as silent:
        assert until_cut(silent) < 4


@pytest.mark.parametrize(
    ("headers", "size", "status"), [(1, 9000, 400), (40, 1000, 400), (0, 70_000, 413), (1, 7000, 200), (0, 100, 200)]
)
def test_large_requests_stop_at_the_proxy(proxy, headers, size, status):
    request = proxy.post(**({} if headers else {"user": "x" * size}))
    for n in range(headers):
        request.headers[f"X-{n}"] = "x" * size
    assert proxy.client.send(request).status_code == status
    seen = metric(proxy.service, "llm_requests_total", path="/v1/completions")
    assert seen == (status == 200)


def test_one_address_has_its_share(llama, tokenizer, nginx, certificate, tmp_path):
    """Requests: a burst of 20 at once, then five a second. Connections: 16 at a time, of those that ask something."""
    limits = Limits(slots=LIMITS.slots, queue=30, max_prompt=100, max_output=120)
    with listening(make_engine(llama, tokenizer, limits, delay=0.05), limits) as url:
        with in_front_of(url, nginx, certificate, tmp_path) as proxy:
            statuses = [proxy.get("/v1/models").status_code for _ in range(30)]
            assert statuses[:20] == [200] * 20
            assert 429 in statuses
        no_rate = [("limit_req zone", "# limit_req zone")]
        with in_front_of(url, nginx, certificate, tmp_path, no_rate) as proxy, ExitStack() as stack:
            request = proxy.post(stream=True, max_tokens=120)
            head = HEAD + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(request.content)
            for _ in range(16):
                stack.enter_context(proxy.connect(head + request.content))
            wait_until(lambda: metric(url, "llm_requests_running") + metric(url, "llm_requests_waiting") == 16, 5)
            assert proxy.get("/v1/models").status_code == 429


def test_the_page_about_the_service_shows_this_file():
    page = (ROOT / "03-Model_Compression" / "Lab-3.1-Quantization" / "Service.md").read_text("utf-8")
    shown = re.search(r"```nginx\n(.*?)```", page, re.S)[1]
    assert shown == EXAMPLE


def test_shares_are_by_the_address_that_the_proxy_saw(proxy, monkeypatch):
    """What a client claims to be is replaced: else it would have as many shares as names that it makes up."""
    seen = []
    monkeypatch.setattr("common.serving.service.client_of", lambda address: seen.append(address) or address)
    for claimed in ("203.0.113.5", "203.0.113.6, 127.0.0.1"):
        request = proxy.post()
        request.headers["X-Forwarded-For"] = claimed
        assert proxy.client.send(request).status_code == 200
    assert seen == ["127.0.0.1"] * 2
