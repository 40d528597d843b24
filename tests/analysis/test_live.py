"""The live server by HTTP alone: what it answers, to whom, when, and how it ends. The browser is in tests/pages."""

import http.client
import json
import socket
import threading

import pytest
from fake_runs import fake_run, train_record

from abyssal.analysis import live
from abyssal.errors import UserError


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "run", [train_record(1), train_record(2)])


@pytest.fixture
def server(run, monkeypatch):
    server = live.Live(0)
    server.start(run)
    yield server
    monkeypatch.setattr(live, "_FAREWELL", 0.0)  # nobody waits for the end here
    server.stop("stopped")


def port_of(server) -> int:
    return int(server.url.rsplit(":", 1)[1].rstrip("/"))


def get(server, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=30)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def news(server, after=""):
    status, body = get(server, f"/data.json?after={after}&page=test")
    assert status == 200
    return json.loads(body)


def append(run, *records):
    with (run / "metrics.jsonl").open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def test_what_is_there(server):
    status, body = get(server)
    assert status == 200
    assert b'id="abyssal-report"' in body
    data = news(server)
    assert data["charts"]["loss"]["data"][0]["x"] == [1, 2]
    assert data["live"]["state"] == "live"
    assert get(server, "/run.json")[0] == 404
    assert get(server, "/../run.json")[0] == 404


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "127.0.0.1:8765"])
def test_hosts_of_this_machine(server, host):
    assert get(server, "/data.json", host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "", "127.0.0.1.evil.example", "localhost.evil:1", "[::1]:80"]
)
@pytest.mark.parametrize("path", ["/", "/data.json"])
def test_other_hosts_are_refused(server, host, path):
    status, body = get(server, path, host)
    assert status == 403
    assert b"loss" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_nothing_but_get(server, method):
    assert get(server, "/", method=method)[0] == 501


@pytest.mark.parametrize("after", ["", "x", "-1", "9" * 5000, "%00", "1e3", "²"])
def test_odd_questions_are_answered(server, after):
    from urllib.parse import quote

    assert get(server, f"/data.json?after={quote(after, safe='%')}")[0] == 200


def test_only_this_machine_can_ask(server):
    assert server._server.server_address[0] == "127.0.0.1"


def test_news_come_when_there_are_some(server, run, monkeypatch):
    monkeypatch.setattr(live, "_AT_LEAST", 0.0)
    monkeypatch.setattr(live, "_SHARE", 1e9)
    version = news(server)["live"]["version"]
    got = []
    asking = threading.Thread(target=lambda: got.append(news(server, version)))
    asking.start()
    append(run, train_record(3))
    asking.join(30)
    assert got[0]["charts"]["loss"]["data"][0]["x"] == [1, 2, 3]
    assert got[0]["live"]["version"] > version


def test_no_news(server, monkeypatch):
    monkeypatch.setattr(live, "_HOLD", 0.0)
    version = news(server)["live"]["version"]
    assert get(server, f"/data.json?after={version}&page=test") == (204, b"")


def test_nothing_is_read_while_nobody_looks_and_no_more_than_was_added(server, run, monkeypatch):
    reads = []
    read = server._run.history.read
    monkeypatch.setattr(server._run.history, "read", lambda **o: reads.append(server._run.history._offset) or read(**o))
    monkeypatch.setattr(live, "_HOLD", 0.0)
    append(run, train_record(3))
    assert reads == []
    size = (run / "metrics.jsonl").stat().st_size
    server._due = 0.0
    news(server)
    assert len(reads) == 1
    assert 0 < reads[0] < size
    assert server._run.history._offset == size
    for _ in range(20):  # not due yet: the file is left alone
        news(server)
    assert len(reads) == 1


def test_answers_take_a_fiftieth_of_the_time(server, run, monkeypatch):
    monkeypatch.setattr(live.time, "thread_time", iter([0.0, 5.0]).__next__)
    monkeypatch.setattr(live.time, "monotonic", lambda: 1e9)
    append(run, train_record(3))
    server._refresh()
    assert server._due == 1e9 + 250


def test_who_waits_hears_of_the_end(run):
    server = live.Live(0)
    server.start(run)
    version = news(server)["live"]["version"]
    got = []
    asking = threading.Thread(target=lambda: got.append(news(server, version)))
    asking.start()
    append(run, train_record(3))
    server.stop("finished")
    asking.join(30)
    assert got[0]["live"]["state"] == "finished"
    assert got[0]["charts"]["loss"]["data"][0]["x"] == [1, 2, 3]
    with pytest.raises(ConnectionRefusedError):
        get(server)
    assert not any(thread.name == "live page" for thread in threading.enumerate())


def test_a_run_without_a_step_yet(tmp_path, monkeypatch):
    path = fake_run(tmp_path / "run", [])
    (path / "metrics.jsonl").unlink()
    server = live.Live(0)
    server.start(path)
    data = news(server)
    assert (data["charts"], data["runs"][0]["experts"]) == ({}, None)
    monkeypatch.setattr(live, "_FAREWELL", 0.0)
    server.stop("failed")


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; choose another") as caught:
            live.Live(port)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
def test_no_port(port):
    with pytest.raises(UserError, match=f"--port {port}: no such port"):
        live.Live(port)


def test_the_usual_port_or_any_other(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(live, "USUAL_PORT", taken.getsockname()[1])
        server = live.Live()
        assert port_of(server) != live.USUAL_PORT
        server.stop("failed")
    server = live.Live()
    assert port_of(server) == live.USUAL_PORT
    server.stop("failed")


def test_a_page_that_goes_away_is_no_news(server, capfd):
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
    assert get(server)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_little_memory_for_pages_that_come_and_go(server, monkeypatch):
    monkeypatch.setattr(live, "_FAREWELL", 0.0)
    for i in range(50):
        get(server, f"/data.json?page={i}{'x' * 1000}")
    server._followed()
    assert len(server._pages) <= 1
