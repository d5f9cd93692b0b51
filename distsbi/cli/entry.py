"""Where the command line begins and ends: errors as sentences, exit codes."""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator

import click

from distsbi.cli.group import cli
from distsbi.cli.log import told, warned

# keywords of the library that are options of another name
ELSEWHERE = {"train": {"checkpoint_dir": "--out", "strategy.model": "--network", "strategy.method": "--method"}}
RESUMES = {"simulate", "train", "catalog"}  # commands that go on where they stopped
LOGGED = RESUMES | {"verify"}  # commands that say what they do


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    quiet = "--quiet" in arguments
    arguments = [argument for argument in arguments if argument not in ("--debug", "--quiet")]
    command = next((name for name in arguments if name in cli.commands), None)
    if not debug:
        # threads of orbax tell the errors that are told below, with pages of traceback, until the process ends
        for name in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        threading.excepthook = sys.excepthook = sys.unraisablehook = lambda *_: None
    said = "interrupted"
    try:
        with (
            _ended_by_sigterm(),
            contextlib.nullcontext() if debug else warned(),
            told(logging.WARNING if quiet else logging.INFO) if command in LOGGED else contextlib.nullcontext(),
        ):
            code = cli.main(arguments, prog_name="distsbi", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        code, said = 2, error.format_message()
    except (click.Abort, KeyboardInterrupt) as error:
        so_far = str(error.__cause__ or error)  # click's Abort has its reason behind it
        if not so_far and command in RESUMES:
            so_far = "what is finished is kept; give the same command again to go on."
        click.echo(f"\nInterrupted{f': {so_far}' if so_far else '.'}", err=True)
        code = getattr(error.__cause__ or error, "exit_code", 130)
    except ValueError as error:
        code, said = 2, _in_options(str(error), command, from_file="--config" in arguments)
        _complain(f"Error: {said}", debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except PermissionError as error:
        code, said = 1, f"{error}"
        _complain(f"Failed: {said}. Give a file or folder that you may read and write.", debug)
    except Exception as error:
        hint = "" if debug else " (--debug shows the traceback)"
        code, said = 1, f"{type(error).__name__}: {error}"
        _complain(f"Failed: {said}{hint}", debug)
    if code and "distsbi.processes" in sys.modules:
        sys.modules["distsbi.processes"].end(failed=said, code=code)  # tells the other processes, where there are some
    sys.exit(code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""

    exit_code = 128 + signal.SIGTERM


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does. (Catalogs and simulations finish their shards first.)"""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_options(message: str, command: str | None, *, from_file: bool = False) -> str:
    """A sentence of the library with its keywords as the options of the command that was given: id_column=None is --id-column ''. `from_file`: what
    was given may be a file's, whose keywords are its own."""
    for keyword, flag in ELSEWHERE.get(command or "", {}).items():
        if not (from_file and (keyword.startswith("strategy.") or "The known ones are" in message)):
            message = re.sub(rf"\b{re.escape(keyword)}\b", flag, message)
    for option in (cli.commands[command] if command else cli).params:
        name, flag = str(option.name), max(option.opts, key=len)
        if "_" in name:  # a single word may be any word of a sentence
            message = re.sub(rf"\b{name}=None\b", f"{flag} ''", message)
            message = re.sub(rf"\b{name}\b=?", lambda found, flag=flag: flag + " " * found[0].endswith("="), message)
        if isinstance(option, click.Option) and option.is_flag:
            message = re.sub(rf"\b{name}=True\b", flag, message)
    return message


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(message, err=True)
