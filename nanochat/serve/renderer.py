"""Makes HTML (markup.py) in a process of its own, so that no text can hold up the event loop.

    python -m nanochat.serve.renderer       # started by Renderer, with the frames of wire.py: parts in, blocks out

A message that takes longer than SECONDS is shown without its markup.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import sys

from nanochat.serve import markup, wire

SECONDS = 3.0  # for one message


class Renderer:
    """The front's side: `blocks` asks the process, and starts another when it has died or dawdled."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self.process: asyncio.subprocess.Process | None = None
        self.starting: asyncio.Task | None = None
        self.turn = asyncio.Lock()

    def start(self) -> asyncio.Task:
        """Begin to start the process, if that has not begun: to import what it needs may take seconds."""
        if self.starting is None:
            self.starting = asyncio.create_task(self._start())
        return self.starting

    async def _start(self) -> None:
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "limit": 1 << 20}
        self.process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, **pipes)
        await wire.receive(self.process.stdout)  # it is ready

    async def blocks(self, parts: list[dict]) -> list[str]:
        """The parts of a reply as blocks of safe HTML; as plain paragraphs if that can't be done in time."""
        try:
            await asyncio.wait_for(self.turn.acquire(), self.seconds)
        except TimeoutError:
            return plain(parts)  # others have given it much to do
        try:
            return await self._blocks(parts)
        finally:
            self.turn.release()

    async def _blocks(self, parts: list[dict]) -> list[str]:
        try:
            await asyncio.wait_for(asyncio.shield(self.start()), self.seconds)
        except TimeoutError:
            return plain(parts)  # it may be ready for the next one
        except OSError:  # no process, no memory or no file descriptor to be had now
            self.starting = None
            return plain(parts)
        try:
            return await asyncio.wait_for(self._ask(parts), self.seconds)
        except (TimeoutError, ConnectionError):
            await self.close()
            return plain(parts)
        except BaseException:  # cancelled between question and answer: the streams are out of step
            await self.close()
            raise

    async def _ask(self, parts: list[dict]) -> list[str]:
        self.process.stdin.write(wire.pack({"parts": parts}))
        answer = await wire.receive(self.process.stdout)
        if answer is None:
            raise ConnectionError
        return answer["blocks"]

    async def close(self) -> None:
        """End the process."""
        starting, self.starting = self.starting, None
        if starting and not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        process, self.process = self.process, None
        if process:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.stdin.close()
            await process.wait()


def plain(parts: list[dict]) -> list[str]:
    """The words alone, a paragraph for each piece between blank lines."""
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return [f"<p>{html.escape(piece)}</p>" for piece in text.split("\n\n") if piece.strip()]


def main() -> None:
    """Answer frames until the input ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = os.fdopen(0, "rb", closefd=False), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    markup.blocks([{"type": "text", "text": "$a$\n\n```py\nb\n```"}])  # all is imported
    wire.write(sink, {"ready": True})
    while (message := wire.read(source)) is not None:
        try:
            made = markup.blocks(message["parts"])
        except Exception:  # noqa: BLE001  (foreign text; the words are shown all the same)
            made = plain(message["parts"])
        wire.write(sink, {"blocks": made})


if __name__ == "__main__":
    main()
