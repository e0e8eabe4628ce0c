"""stdin, stdout and stderr, made such that nothing goes wrong by what is at their other end."""

from __future__ import annotations

import errno
import io
import os
import sys

# A pipe whose reader has gone, and a terminal that was closed, take nothing any more.
_GONE = (errno.EPIPE, errno.EIO)


def make_ready() -> None:
    """What is closed leads nowhere, what stderr cannot take is dropped, what stdout cannot is an error that
    names it, and a character that an encoding lacks (ASCII's, under some schedulers and in containers) is a
    question mark."""
    _open_closed()
    for name, kind in (("stdout", _Results), ("stderr", _Remarks)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            buffering = stream.line_buffering, stream.write_through
            setattr(sys, name, kind(stream.buffer, stream.encoding, stream.errors, None, *buffering))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def silence(stream: io.TextIOBase) -> None:
    """Leads the stream's descriptor nowhere: whatever is written to it, also by libraries, is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open_closed() -> None:
    """Opens those of the three that the process was started without (`>&-`). Else the next file that is
    opened takes the place, and what libraries print lands in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (for good)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


class _Stream(io.TextIOWrapper):
    def write(self, text: str) -> int:
        try:
            super().write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._failed(error)


class _Results(_Stream):
    """stdout: its errors carry its name."""

    def _failed(self, error: OSError) -> None:
        error.filename = "stdout"
        raise error


class _Remarks(_Stream):
    """stderr, whose loss ends no work: notes and progress are not worth hours of it."""

    def _failed(self, error: OSError) -> None:
        if error.errno in _GONE:
            silence(self)
