"""Runs the server: takes the port first, tells where it is when it is ready, and lets running requests finish."""

from __future__ import annotations

import errno
import functools
import ipaddress
import signal
import socket
import sys

import uvicorn

from abyssal.errors import UserError
from abyssal.generation.engine import Engine
from abyssal.generation.sampling import Sampling
from abyssal.serving.app import Limits, create_app
from abyssal.serving.guard import LOOPBACK


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; taken before a model is loaded, which may take minutes. Raises UserError."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port: {port} is not valid; expected a number from 0 (any that is free) to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host: {host!r} is no address of this machine, such as 127.0.0.1") from None
    own = socket.socket(family, kind, protocol)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
        own.listen(1024)  # here, so that a second server finds the port taken now and not when its model is loaded
    except OSError as error:
        own.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port: {port} is in use; choose another one, or 0 for any that is free") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host: {host!r} is no address of this machine, such as 127.0.0.1") from None
        raise UserError(f"--port: {port}: {error.strerror}; choose another one") from None
    return own


def url_of(own: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = own.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(own: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(own.getsockname()[0]).is_loopback


def warm_up(engine: Engine) -> None:
    """Lets the engine write two tokens: kernels are compiled at their first use, which should be nobody's wait."""
    model = engine.model
    own = Engine(model, engine.tokenizer, pages=1, prefix_cache=False, others=engine.passes.others)
    start = engine.tokenizer.bos_id
    own.add([0 if start is None else start], Sampling(max_new_tokens=2, temperature=0))
    while own.busy:
        own.step()


class _Server(uvicorn.Server):
    """Says that it is ready when it is."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            print(self._ready, flush=True)


def serve(
    engine: Engine,
    name: str,
    own: socket.socket,
    *,
    key: str | None,
    limits: Limits,
    finish: int,
    log_requests: bool,
    ready: str,
) -> None:
    """Serves until SIGINT or SIGTERM; then no more requests are taken, and those that run have ``finish`` seconds.
    Prints ``ready`` when it answers."""
    host = own.getsockname()[0]
    hosts = {*LOOPBACK, f"[{host}]" if ":" in host else host} if is_loopback(own) else None
    log = functools.partial(print, file=sys.stderr, flush=True) if log_requests else None
    config = uvicorn.Config(
        create_app(engine, name, key=key, limits=limits, hosts=hosts, log=log),
        log_level="warning",
        timeout_graceful_shutdown=finish,
        # Longer than clients keep a connection that they do not use: who closes it first must not be the one who then
        # finds a request on it.
        timeout_keep_alive=75,
        server_header=False,
    )
    # uvicorn sends itself the signal once more when all is done, which would end the process as a failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    _Server(config, ready).run(sockets=[own])
