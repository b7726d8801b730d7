"""Megatron's log of every array and token that it reads, kept out of a notebook."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quietly"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Build Megatron's data sets and tokenizers in a notebook's kernel without their log; warnings and errors stay.

    Example:
        >>> with quietly():
        ...     print("> building train, validation, and test datasets for GPT ...")
        >>> logging.getLogger("megatron").level == logging.WARNING
        False
    """
    logger = logging.getLogger("megatron")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # There is only this one process, so rank 0 is right.
            warnings.filterwarnings("ignore", message="Could not determine rank")
            yield
    finally:
        logger.setLevel(before)
