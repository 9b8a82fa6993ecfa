"""A terminal for tests: two streams on a pty, and what a person would see after all that was written to them."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading

COLUMNS = 100


def screen(data):
    """The lines that a terminal shows after these bytes: carriage returns overwrite, ESC [K empties to the right."""
    lines, column = [""], 0
    for piece in re.findall(r"\x1b\[K|.", data.decode("utf-8"), re.DOTALL):
        if piece == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif piece == "\r":
            column = 0
        elif piece == "\n":
            lines.append("")
        else:
            lines[-1] = f"{lines[-1][:column]:<{column}}{piece}{lines[-1][column + 1 :]}"
            column += 1
    return [line.rstrip() for line in lines]


class Terminal:
    """Two streams to stand for standard output and error; `close()` returns the lines on the screen."""

    def __init__(self):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, COLUMNS, 0, 0))
        self.streams = [open(os.dup(slave), "w", encoding="utf-8", buffering=1) for _ in range(2)]
        os.close(slave)
        self.data = b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(self.master, 4096):
                self.data += part

    def close(self):
        for stream in self.streams:
            stream.close()
        self.reader.join()
        os.close(self.master)
        return screen(self.data)
