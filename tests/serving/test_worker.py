"""What stands between the event loop and the engine: a bound on what waits, ends that come early, engines that fail.
The engine makes its steps only when a test allows it, so everything happens in a known order."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from api_servers import (
    CONTEXT,
    LONGEST_WAIT,
    PAGE,
    Held,
    Served,
    engine_for,
    run_loop,
    serving,
    small_model,
    wait_for,
)

from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.generation import Sampling, generate
from abyssal.generation.engine import Engine
from abyssal.model import Transformer
from abyssal.serving import app as app_module
from abyssal.serving.app import Limits
from abyssal.serving.monitoring import Monitoring
from abyssal.serving.worker import Full, Job, Piece, Ticket, Worker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NO_END = {"1": -100}


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the server has noticed that a client is gone. (With an engine that stands still, no ticket is cancelled
    for any other reason.)"""
    noticed = threading.Event()
    cancel = Ticket.cancel

    def spy(ticket: Ticket) -> None:
        cancel(ticket)
        noticed.set()

    monkeypatch.setattr(Ticket, "cancel", spy)
    return noticed


def in_background(function: Callable[[], Any]) -> Callable[[], Any]:
    """Starts ``function``; what is given back waits for what it gives, or raises what it raised."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(function())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(LONGEST_WAIT)
        if isinstance(out[0], Exception):
            raise out[0]
        return out[0]

    return result


# the bound


def test_more_than_may_wait_are_refused(held: Served, model: Transformer, byte_level: Tokenizer):
    """Two that are worked on and one that waits; for others there is room again when one has ended."""
    assert held.worker.most == 3
    answers = [in_background(lambda i=i: held.complete(f"client {i}", temperature=0, max_tokens=5)) for i in range(3)]
    wait_for(lambda: held.worker.inside == 3)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            held.complete("one more", stream=stream)
        assert caught.value.code == "overloaded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert held.worker.inside == 3  # who was refused takes no room
    held.engine.let_go()
    texts = [generate(model, byte_level, f"client {i}", temperature=0, max_new_tokens=5) for i in range(3)]
    assert [answer().choices[0].text for answer in answers] == texts
    assert held.complete("one more", max_tokens=1).usage.prompt_tokens == 1 + len(b"one more")


def test_a_place_is_taken_before_a_request_is_worked_out(
    held: Served, left: threading.Event, monkeypatch: pytest.MonkeyPatch
):
    """Those that wait for a template, a tokenizer or a schema wait too; one whose client leaves is not worked out."""
    begun, free, seen = threading.Semaphore(0), threading.Event(), []
    prepare = held.app.state.service.preparation.completion

    def slowly(body: Any) -> Any:
        seen.append(body.prompt)
        begun.release()
        assert free.wait(LONGEST_WAIT)
        return prepare(body)

    monkeypatch.setattr(held.app.state.service.preparation, "completion", slowly)
    monkeypatch.setattr(held.app.state.service.preparing, "total_tokens", 1)
    held.engine.let_go()
    first = in_background(lambda: held.complete("first", max_tokens=1))
    assert begun.acquire(timeout=LONGEST_WAIT)

    async def leaves() -> None:
        async with httpx.AsyncClient(base_url=held.url, timeout=LONGEST_WAIT, trust_env=False) as client:
            asking = asyncio.ensure_future(client.post(TEXT, json={"prompt": "second", "max_tokens": 1}))
            await asyncio.to_thread(wait_for, lambda: held.worker.inside == 2)
            asking.cancel()

    run_loop(leaves)
    assert left.wait(LONGEST_WAIT)
    third = in_background(lambda: held.complete("third", max_tokens=1))
    wait_for(lambda: held.worker.inside == 3)
    with pytest.raises(openai.RateLimitError):
        held.complete("one more")
    free.set()
    assert first().usage.completion_tokens <= 1
    assert third().usage.completion_tokens <= 1
    wait_for(lambda: held.worker.inside == 0)
    assert seen == ["first", "third"]


def test_who_does_not_read_keeps_the_place(held: Served):
    """However much waits for such a client, it is no more than the places there are."""
    held.engine.let_go()
    before = held.in_worker(lambda engine: engine.metrics.finished.get("length", 0))
    held.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # connections have their listener's
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        client.settimeout(LONGEST_WAIT)
        client.connect(held.socket.getsockname())
        body = {"prompt": "x", "max_tokens": 350, "logprobs": 20, "experts": True, "stream": True}
        text = json.dumps(body | {"logit_bias": NO_END, "n": 3}).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        held.until(lambda engine: engine.metrics.finished.get("length", 0) == before + 3)
        assert held.worker.inside == 3
        with pytest.raises(openai.RateLimitError):
            held.complete("one more")
    wait_for(lambda: held.worker.inside == 0)  # now that it has gone


def test_all_of_a_request_or_nothing_of_it(held: Served):
    with pytest.raises(openai.BadRequestError) as caught:
        held.complete("x", n=4)  # would never have room
    assert caught.value.param == "n"
    answer = in_background(lambda: held.complete("x", n=2, max_tokens=2))
    wait_for(lambda: held.worker.inside == 2)
    with pytest.raises(openai.RateLimitError):
        held.complete("x", n=2, max_tokens=2)
    held.engine.let_go()
    assert len(answer().choices) == 2


# clients that leave


def raw_stream(held: Served, path: str, **body: Any) -> Any:
    """The response of a client of its own, which leaves when the block ends."""
    client = httpx.Client(base_url=held.url, timeout=LONGEST_WAIT, trust_env=False)
    return client, client.stream("POST", path, json=body)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_who_leaves_is_worked_for_no_longer(held: Served, left: threading.Event, path: str, stream: bool):
    """In the middle of the answer: its pages are free, its place too, and no step is made for it."""
    body: dict[str, Any] = {"max_tokens": 300, "stream": stream, "logit_bias": NO_END, "n": 2}
    body |= {"messages": [{"role": "user", "content": "Hello"}]} if path == CHAT else {"prompt": "Hello"}
    before = held_counts(held)

    async def leaves() -> None:
        async with httpx.AsyncClient(base_url=held.url, timeout=LONGEST_WAIT, trust_env=False) as client:
            if stream:
                held.engine.allowed.release(3)
                async with client.stream("POST", path, json=body) as response:
                    assert response.status_code == 200
                    async for line in response.aiter_lines():
                        if line.startswith("data: "):
                            break
            else:
                task = asyncio.create_task(client.post(path, json=body))
                await asyncio.to_thread(held.engine.entered.wait, LONGEST_WAIT)
                held.engine.allowed.release(3)
                task.cancel()

    run_loop(leaves)
    assert left.wait(LONGEST_WAIT)
    held.engine.let_go()
    held.idle()
    after = held_counts(held)
    assert after["cancelled"] == before["cancelled"] + 2
    assert after["tokens"] - before["tokens"] <= 2 * 8  # of 600


def held_counts(held: Served) -> dict[str, float]:
    """Read off the engine, which stands still, and not by its thread."""
    metrics = held.engine.metrics
    return {"cancelled": metrics.finished.get("cancelled", 0), "tokens": metrics.new_tokens}


def test_who_leaves_before_the_engine_has_looked(held: Served, left: threading.Event, caplog: pytest.LogCaptureFixture):
    """The request waits in the inbox: it never gets into the engine, and nothing is logged as a failure of ours."""
    first = in_background(lambda: held.complete("first", max_tokens=2, logit_bias=NO_END))
    assert held.engine.entered.wait(LONGEST_WAIT)

    async def leaves() -> None:
        async with httpx.AsyncClient(base_url=held.url, timeout=LONGEST_WAIT, trust_env=False) as client:
            task = asyncio.create_task(client.post(TEXT, json={"prompt": "second"}))
            await asyncio.to_thread(wait_for, lambda: held.worker.inside == 2)
            task.cancel()

    run_loop(leaves)
    assert left.wait(LONGEST_WAIT)
    before = held.engine.metrics.prompt_tokens
    held.engine.let_go()
    assert first().usage.completion_tokens == 2
    held.idle()
    assert held.engine.metrics.prompt_tokens == before
    wait_for(lambda: held.worker.inside == 0)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_the_openai_client_can_leave_a_stream(held: Served, left: threading.Event):
    held.engine.allowed.release(3)
    stream = held.chat(max_tokens=300, stream=True, logit_bias=NO_END)
    next(iter(stream))
    stream.close()
    assert left.wait(LONGEST_WAIT)
    held.engine.let_go()
    held.idle()


def test_those_who_stay_notice_nothing(held: Served, left: threading.Event, model: Transformer, byte_level: Tokenizer):
    text = generate(model, byte_level, "stays", temperature=0, max_new_tokens=40)
    stays = in_background(lambda: held.complete("stays", temperature=0, max_tokens=40))
    assert held.engine.entered.wait(LONGEST_WAIT)
    goes = in_background(lambda: held.complete("goes", max_tokens=300, stream=True, logit_bias=NO_END))
    wait_for(lambda: held.worker.inside == 2)
    held.engine.allowed.release(5)
    stream = goes()
    next(iter(stream))
    stream.close()
    assert left.wait(LONGEST_WAIT)
    held.engine.let_go()
    assert stays().choices[0].text == text


# time


@pytest.fixture(scope="module")
def hurried(model: Transformer, byte_level: Tokenizer) -> Iterator[Served]:
    """A server that gives a request a second."""
    engine = engine_for(model, byte_level, Held, most=2)
    yield from serving(engine, limits=Limits(waiting=4, seconds=1.0))


def test_a_request_that_takes_too_long(hurried: Served):
    """Three ways: it is not even taken in, it has begun, it has sent some of its answer. All are cancelled."""
    engine = hurried.engine
    with pytest.raises(openai.InternalServerError) as begun:
        hurried.complete("x", max_tokens=3)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as waits:
            hurried.complete("y", max_tokens=3, stream=stream)
        assert waits.value.status_code == begun.value.status_code == 504
        assert waits.value.code == begun.value.code == "timeout"
    engine.let_go()
    hurried.idle()
    # One alone, none of it computed: who waited never got in.
    assert engine.metrics.finished == {"cancelled": 1}

    engine.hold()
    engine.allowed.release(2)
    with hurried.http.stream(
        "POST", CHAT, json={"messages": [{"role": "user", "content": "x"}], "stream": True, "logit_bias": NO_END}
    ) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert all("choices" in json.loads(event) for event in events[:-1])
    assert json.loads(events[-1])["error"]["code"] == "timeout"
    assert "[DONE]" not in events
    engine.let_go()
    hurried.idle()
    assert hurried.complete("z", max_tokens=1).usage.prompt_tokens == 2


def test_a_stream_says_that_it_is_alive(held: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app_module, "_ALIVE", 0.01)
    held.engine.allowed.release(1)
    body = {"prompt": "x", "stream": True, "max_tokens": 3, "logit_bias": NO_END}
    with held.http.stream("POST", TEXT, json=body) as response:
        lines = response.iter_lines()
        comments = 0
        while comments < 3:
            line = next(lines)
            assert line == "" or line.startswith(("data: ", ": "))
            comments += line.startswith(": ")
        held.engine.let_go()
        assert [line for line in lines if line][-1] == "data: [DONE]"


# engines that fail


class Failing(Engine):
    """Fails in the step, or in the call, that a test says; `cancel` too where that is wanted."""

    failures = 0
    cancels = True

    def step(self, recorder: Any = None) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is\non fire")
        return super().step(recorder)

    def cancel(self, sequence: Any) -> None:
        if not self.cancels:
            raise RuntimeError("burnt")
        super().cancel(sequence)


@pytest.fixture
def failing(model: Transformer, byte_level: Tokenizer) -> Iterator[Served]:
    yield from serving(engine_for(model, byte_level, Failing))


def test_an_engine_that_fails_once(failing: Served, caplog: pytest.LogCaptureFixture):
    """Who was in it is told; the next ones are answered as ever."""
    for stream in (False, True):
        failing.engine.failures = 1
        with pytest.raises(openai.APIError) as caught:
            list(failing.complete("x", n=3, stream=stream))
        assert caught.value.code == "engine_error"
        assert "RuntimeError: the device is on fire" in str(caught.value)
        failing.idle()
        assert failing.complete("x", max_tokens=2, logit_bias=NO_END).usage.completion_tokens == 2
        assert failing.http.get("/health").status_code == 200
    assert "the device is\non fire" in caplog.text


def test_an_engine_that_is_beyond_repair(failing: Served, caplog: pytest.LogCaptureFixture):
    """It fails, and what was in it cannot be taken out: the server says so to everyone, instead of trying for ever."""
    failing.engine.cancels = False
    failing.engine.failures = 10**9
    with pytest.raises(openai.InternalServerError) as caught:
        failing.complete("x", max_tokens=2)
    assert caught.value.code == "engine_error"
    wait_for(lambda: not failing.worker.healthy)
    assert failing.http.get("/health").status_code == 503
    made = failing.engine.failures
    for _ in range(3):
        with pytest.raises(openai.InternalServerError) as caught:
            failing.complete("y", max_tokens=2)
        assert caught.value.code == "engine_error"
    assert failing.worker.inside == 0
    assert failing.engine.failures == made
    assert caplog.text.count("Traceback") < 10
    failing.http.get("/metrics")  # is answered, well or not


class Lost(Failing):
    """Has lost the other processes of its model once it has failed."""

    @property
    def lost(self) -> bool:
        return True


def test_an_engine_that_has_lost_its_other_processes(model: Transformer, byte_level: Tokenizer):
    for served in serving(engine_for(model, byte_level, Lost)):
        assert served.complete("x", max_tokens=2).usage.completion_tokens == 2
        served.engine.failures = 1
        with pytest.raises(openai.InternalServerError) as caught:
            served.complete("x", max_tokens=2)
        assert caught.value.code == "engine_error"
        assert served.http.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="start the server anew"):
            served.complete("x", max_tokens=2)


# the worker itself


def in_a_worker(engine: Engine, waiting: int, use: Callable[[Worker], Any]) -> Any:
    """What the coroutine ``use(worker)`` gives, in a loop of its own."""

    async def run() -> Any:
        worker = Worker(engine, Monitoring(engine.model), waiting)
        worker.start()
        try:
            return await use(worker)
        finally:
            if isinstance(engine, Held):
                engine.let_go()
            await asyncio.to_thread(worker.stop)

    return run_loop(run)


def job(count: int, **more: Any) -> Job:
    return Job([0, 40, 41], Sampling(max_new_tokens=count, temperature=0, logit_bias=((1, -100.0),)), **more)


def submit(worker: Worker, jobs: list[Job]) -> Ticket:
    ticket = worker.reserve(len(jobs))
    worker.submit(ticket, jobs)
    return ticket


async def all_of(ticket: Ticket) -> list[Piece]:
    pieces = [piece async for pieces in ticket.pieces() for piece in pieces]
    ticket.release()
    return pieces


def test_a_ticket_brings_all_that_comes(model: Transformer, byte_level: Tokenizer):
    text = generate(model, byte_level, [0, 40, 41], temperature=0, max_new_tokens=30, logit_bias=((1, -100.0),))
    engine = engine_for(model, byte_level)

    async def use(worker: Worker) -> None:
        ticket = submit(worker, [job(30), job(7, routing=True)])
        await ticket.accepted
        pieces = await all_of(ticket)
        for index, count in ((0, 30), (1, 7)):
            mine = [piece for piece in pieces if piece.index == index]
            assert [piece.finished for piece in mine] == [None] * (len(mine) - 1) + ["length"]
            assert sum(len(piece.tokens) for piece in mine) == count
            assert sum(len(piece.routing) for piece in mine) == (7 if index else 0)
        assert "".join(piece.text for piece in pieces if piece.index == 0) == text
        assert worker.inside == 0
        ticket.cancel()  # too late, and no harm
        assert await worker.ask(lambda engine: engine.metrics.finished) == {"length": 2}

    in_a_worker(engine, 0, use)


def test_what_the_engine_refuses(model: Transformer, byte_level: Tokenizer):
    """A request of two, the second of which is impossible: nothing of it stays."""
    engine = engine_for(model, byte_level)

    async def use(worker: Worker) -> None:
        bad = Job([0] * CONTEXT, Sampling())
        ticket = submit(worker, [job(5), bad])
        assert worker.inside == 2
        with pytest.raises(UserError, match="context"):
            await ticket.accepted
        ticket.release()
        ticket.release()  # twice is once
        assert worker.inside == 0
        assert await worker.ask(lambda engine: (engine.busy, engine.pool.in_use)) == (False, 0)
        with pytest.raises(RuntimeError, match="AttributeError"):
            await submit(worker, [Job([0], 3)]).accepted  # type: ignore[arg-type]
        assert worker.inside == 1  # whoever has places holds them until they are given back
        assert len(await all_of(submit(worker, [job(2)]))) >= 2

    in_a_worker(engine, 10, use)


def test_cancelled_in_the_middle(model: Transformer, byte_level: Tokenizer):
    engine = engine_for(model, byte_level, Held)

    async def use(worker: Worker) -> None:
        ticket = submit(worker, [job(100), job(2)])
        await ticket.accepted
        engine.allowed.release(4)
        got: list[Piece] = []
        async for pieces in ticket.pieces():
            got += pieces
            if not ticket.cancelled and sum(len(piece.tokens) for piece in got) >= 4:
                ticket.cancel()
                ticket.cancel()  # twice is once
                engine.let_go()
        assert [piece.finished for piece in got if piece.finished] == ["length", "cancelled"]
        ticket.release()
        assert worker.inside == 0
        assert await worker.ask(lambda engine: engine.pool.in_use) == 0

    in_a_worker(engine, 0, use)


def test_the_queue_is_bounded(model: Transformer, byte_level: Tokenizer):
    engine = engine_for(model, byte_level, Held, most=2)

    async def use(worker: Worker) -> None:
        tickets = [submit(worker, [job(2)]) for _ in range(2)] + [submit(worker, [job(2)] * 3)]
        with pytest.raises(Full) as caught:
            submit(worker, [job(2)])
        assert 1 <= caught.value.retry_after <= 60
        tickets[-1].release()  # before the engine has seen it
        engine.let_go()
        with pytest.raises(UserError, match="cancelled"):
            await tickets[-1].accepted
        for ticket in tickets[:2]:
            assert (await all_of(ticket))[-1].finished == "length"
        assert worker.inside == 0
        assert (await all_of(submit(worker, [job(1)] * 5)))[-1].finished == "length"

    in_a_worker(engine, 3, use)


def test_asking_what_fails(model: Transformer, byte_level: Tokenizer):
    async def use(worker: Worker) -> None:
        with pytest.raises(ZeroDivisionError):
            await worker.ask(lambda engine: 1 // 0)
        assert await worker.ask(lambda engine: engine.pool.page) == PAGE
        assert worker.healthy

    in_a_worker(engine_for(model, byte_level), 0, use)


def test_stopping_ends_the_thread(model: Transformer, byte_level: Tokenizer):
    """Also where work is left, and where nobody listens any more."""
    engine = engine_for(model, byte_level)

    async def use(worker: Worker) -> Worker:
        await submit(worker, [job(300)]).accepted
        return worker

    assert not in_a_worker(engine, 0, use)._thread.is_alive()
    assert engine.busy


def test_a_broken_sequence_leaves_the_others_alone(byte_level: Tokenizer):
    model = small_model(258)
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = torch.nan
    engine = engine_for(model, byte_level)

    async def use(worker: Worker) -> None:
        broken, sound = submit(worker, [Job([0, 200], Sampling())]), submit(worker, [job(5)])
        (piece,) = await all_of(broken)
        assert (piece.finished, "nan" in (piece.error or "")) == ("error", True)
        assert sum(len(piece.tokens) for piece in await all_of(sound)) == 5

    in_a_worker(engine, 0, use)
