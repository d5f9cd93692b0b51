"""What a long command says on stderr while it works: a line with its time for each event, above a progress bar where one is on a terminal."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

FORMAT = "%(asctime)s %(levelname)s %(message)s"
TIME = "%Y-%m-%dT%H:%M:%S%z"  # with the zone, to be compared with the logs of other machines


class _AboveBars(logging.Handler):
    """Writes to stderr without tearing a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def told(level: int) -> Iterator[None]:
    """What distsbi logs from this level on is written to stderr for the time of the block."""
    logger, handler = logging.getLogger("distsbi"), _AboveBars()
    handler.setFormatter(logging.Formatter(FORMAT, TIME))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # a library that gives the root logger a handler would have each line written twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextlib.contextmanager
def warned() -> Iterator[None]:
    """Warnings to users are sentences on stderr for the time of the block, without the line of a program that they did not write."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning):
                before(message, category, *where, **more)
                return
            from tqdm import tqdm

            tqdm.write(f"Warning: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield
