"""Messages between the front process and an engine process: JSON behind its length, over pipes or a socket.

A frame is 4 bytes (big-endian length of what follows) and a JSON object. Nothing that comes from outside is unpickled.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import BinaryIO

MAX_FRAME = 64 << 20  # bytes; far above any request, so a larger length means that the stream is out of step
_LENGTH = struct.Struct(">I")


def pack(message: dict) -> bytes:
    """The frame of a message."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


def _size(head: bytes) -> int:
    (size,) = _LENGTH.unpack(head)
    if size > MAX_FRAME:
        raise ValueError(f"a frame claims {size} bytes: the stream is out of step")
    return size


def read(file: BinaryIO) -> dict | None:
    """The next message of a blocking, buffered file; None at its end, even in the middle of a frame."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _size(head)
    body = file.read(size)
    return json.loads(body) if len(body) == size else None


def write(file: BinaryIO, message: dict) -> None:
    """Send a message through a blocking file."""
    file.write(pack(message))
    file.flush()


async def receive(reader: asyncio.StreamReader) -> dict | None:
    """The next message of a stream; None at its end."""
    try:
        return json.loads(await reader.readexactly(_size(await reader.readexactly(_LENGTH.size))))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
