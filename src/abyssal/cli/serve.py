"""``abyssal serve``: a model behind OpenAI's API, and a page to chat with it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from abyssal.cli.decoding import DraftsOption
from abyssal.cli.loaded import AllowMissingOption, DeviceOption, DtypeOption, ModelArgument, WeightsOption
from abyssal.cli.processes import ExpertOption, TensorOption, gather, loaded


def serve_command(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its folder's name, or that on the hub.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ABYSSAL_API_KEY", help="Ask clients for this key; better set in the environment."),
    ] = None,
    running: Annotated[int, typer.Option(help="Answers that are worked on at a time.")] = 64,
    waiting: Annotated[int, typer.Option(help="Answers that may wait beside them; more are refused (429).")] = 256,
    memory: Annotated[
        float, typer.Option(help="GiB for the cache of past tokens; at least what one whole context takes.")
    ] = 1.0,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, its waiting included.")] = 600.0,
    finish: Annotated[int, typer.Option(help="Seconds that running requests have when the server is stopped.")] = 30,
    max_body: Annotated[float, typer.Option(help="MiB of a request at most.")] = 4.0,
    drafts: DraftsOption = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line for each request.")] = False,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    device: DeviceOption = "auto",
    allow_missing: AllowMissingOption = None,
    tensor: TensorOption = 1,
    expert: ExpertOption = 1,
) -> None:
    """Serve a model: OpenAI's API under /v1, a chat page at /. Ctrl-C lets running answers finish."""
    from abyssal.errors import UserError

    try:
        from abyssal.serving.app import Limits
        from abyssal.serving.run import bind, is_loopback, serve, url_of, warm_up
    except ImportError as error:
        raise UserError(f"serve: {error.name} is not installed: pip install 'abyssal[serve]'") from None
    from abyssal.generation.engine import Engine

    for option, value, least in (
        ("--running", running, 1),
        ("--waiting", waiting, 0),
        ("--finish", finish, 0),
    ):
        if value < least:
            raise UserError(f"{option}: {value} is not valid; expected a whole number from {least}")
    for option, number in (("--timeout", timeout), ("--max-body", max_body), ("--memory", memory)):
        if not 0 < number < 1e9:
            raise UserError(f"{option}: {number} is not valid; expected a number above 0")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UserError("--api-key: expected printable ASCII characters, without blanks around them")
    together = gather(tensor, expert, device)
    with together.agreed("a port"):
        own = bind(host, port) if together.first else None
    options: dict[str, Any] = {"dtype": dtype, "weights": weights, "device": device, "allow_missing": allow_missing}
    with own or nullcontext(), loaded(together, model, **options) as (network, tokenizer, others):
        assert own is not None  # the other processes are in there until the server ends
        if tokenizer.chat is not None:
            tokenizer.chat.check()
        try:
            engine = Engine(network, tokenizer, memory=int(memory * 2**30), most=running, drafts=drafts, others=others)
        except (RuntimeError, MemoryError) as error:  # torch's allocators
            if "memory" not in str(error):
                raise
            raise UserError(f"--memory: {memory:g} GiB are more than there is; expected less") from None
        warm_up(engine)
        if api_key is None and not is_loopback(own):
            typer.echo(
                "abyssal: warning: whoever reaches this machine can use the model; --api-key asks for a key", err=True
            )
        url = url_of(own)
        served = name or (Path(model).resolve().name if Path(model).exists() else model)
        serve(
            engine,
            served,
            own,
            key=api_key,
            limits=Limits(waiting, timeout, int(max_body * 2**20)),
            finish=finish,
            log_requests=log_requests,
            ready=f"{served}: the page is {url}/, the API {url}/v1; Ctrl-C stops",
        )
