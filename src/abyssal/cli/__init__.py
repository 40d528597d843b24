"""The command line: one file a command, thin. What the user got wrong is one line and exit code 2."""

from __future__ import annotations

import functools
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from abyssal.cli.chat import chat_command
from abyssal.cli.eval import eval_command
from abyssal.cli.export import convert_command, export_command
from abyssal.cli.generate import generate_command
from abyssal.cli.inspect import inspect_command
from abyssal.cli.lab import lab_command
from abyssal.cli.lens import lens_command
from abyssal.cli.plan import plan_command
from abyssal.cli.presets import presets_command
from abyssal.cli.preview import preview_command
from abyssal.cli.report import report_command
from abyssal.cli.serve import serve_command
from abyssal.cli.train import train_command
from abyssal.cli.tune import tune_command
from abyssal.cli.upcycle import upcycle_command
from abyssal.errors import UserError


def _on_suitable_threads(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with no more of torch's threads than this container may run at once. Here rather than in
    :func:`main`, since torch has to be loaded for it, which takes seconds that ``--help`` should not."""

    @functools.wraps(command)  # typer reads the options from what is wrapped
    def run(*arguments: Any, **options: Any) -> None:
        from abyssal.training.hardware import limit_threads

        limit_threads()
        command(*arguments, **options)

    return run


app = typer.Typer(
    name="abyssal",
    help="The DeepSeek model line: configure, train, look inside, fine-tune, run.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"abyssal {version('abyssal')}, torch {version('torch')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the versions of abyssal and PyTorch.", is_eager=True, callback=_say_version
        ),
    ] = False,
) -> None:
    """What stands before a command."""


app.command("presets")(presets_command)
app.command("inspect")(inspect_command)
app.command("plan")(plan_command)
app.command("preview")(preview_command)
app.command("train")(_on_suitable_threads(train_command))
app.command("tune")(_on_suitable_threads(tune_command))
app.command("upcycle")(_on_suitable_threads(upcycle_command))
app.command("report")(report_command)
app.command("lens")(_on_suitable_threads(lens_command))
app.command("lab")(_on_suitable_threads(lab_command))
app.command("generate")(_on_suitable_threads(generate_command))
app.command("chat")(_on_suitable_threads(chat_command))
app.command("serve")(_on_suitable_threads(serve_command))
app.command("eval")(_on_suitable_threads(eval_command))
app.command("export")(_on_suitable_threads(export_command))
app.command("convert")(_on_suitable_threads(convert_command))


def main() -> None:
    """Runs the command line and exits: 0 well, 2 for what the user must change, 130 for Ctrl-C."""
    warnings.showwarning = _show_warning
    # Before torch is loaded: threads that wait for each other sleep instead of spinning. Where another process wants a
    # core too, spinning makes a training step several times as long (docs/notebook.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a ?
    try:
        for argument in sys.argv[1:]:
            argument.encode("utf-8")
        code = typer.main.get_command(app).main(args=_arguments(sys.argv[1:]), standalone_mode=False)
    except UserError as error:
        code = _fail(str(error))
    except UnicodeEncodeError as error:
        code = _fail(f"{error.object[max(error.start - 20, 0) : error.end + 20]!r}: has no UTF-8 form")
    except MemoryError as error:
        code = _fail(f"not enough memory: {error}")
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:  # a full disk, a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):  # torch's allocators
            sys.exit(_fail(f"not enough memory: {str(error).splitlines()[0]}"))
        if (lost := _contact_lost(error)) is not None:
            sys.exit(lost)
        # What typer says of wrong arguments; by its method, since typer brings a click of its own from some version on.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if message.startswith("No such command") and "Did you mean" not in message:
            names = [str(command.name) for command in app.registered_commands]
            message = f"{message.rstrip('.')}; expected one of {', '.join(names)}"
        code = _fail(message)
    sys.exit(code if isinstance(code, int) else 0)


def _arguments(arguments: list[str]) -> list[str]:
    """``--resume`` alone means ``--resume auto``; no arguments at all ask for help."""
    out = [] if arguments else ["--help"]
    for i, argument in enumerate(arguments):
        out.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if argument == "--resume" and (
            following.startswith("-") or ("=" in following and not os.path.exists(following))
        ):
            out.append("auto")
    return out


def _fail(message: str, code: int = 2) -> int:
    def say() -> None:
        print(f"abyssal: error: {_one_line(message)}", file=sys.stderr, flush=True)

    if "RANK" not in os.environ:
        say()
    else:  # of the processes that torchrun started, one speaks
        from abyssal.distributed.launch import end_together

        end_together(message, say, wait=code == 2)
    return code


def _contact_lost(error: Exception) -> int | None:
    """The exit code, where ``error`` came of the end of another of the processes that torchrun started."""
    if "RANK" not in os.environ:
        return None
    from abyssal.distributed.launch import contact_lost

    lost = contact_lost(error)
    return None if lost is None else _fail(*lost)


def _one_line(message: str) -> str:
    from abyssal.cli.show import printable

    return printable(" ".join(message.split()))


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"abyssal: warning: {_one_line(str(message))}", file=sys.stderr)
