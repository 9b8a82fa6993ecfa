"""How much one client may ask: replies in flight, and requests a minute (a token bucket), by network address."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field

REMEMBERED = 10_000  # clients, the least recent forgotten first


class TooMany(Exception):
    """A client asks too much; `seconds` until it may ask again."""

    def __init__(self, message: str, seconds: int):
        super().__init__(message)
        self.seconds = seconds


@dataclass
class _Client:
    tokens: float
    seen: float
    replies: int = 0


@dataclass
class Clients:
    """Counts by address. at_once: replies in flight a client; per_minute: its requests. 0 is no limit."""

    at_once: int = 0
    per_minute: int = 0
    seen: OrderedDict[str, _Client] = field(default_factory=OrderedDict)

    def enter(self, address: str, replies: int, asks: int = 1) -> None:
        """A client asks for so many replies; it counts as `asks` requests. TooMany: it may not now."""
        now = time.monotonic()
        client = self.seen.setdefault(address, _Client(float(self.per_minute), now))
        self.seen.move_to_end(address)
        self._forget()
        rate = self.per_minute / 60
        client.tokens = min(float(self.per_minute), client.tokens + (now - client.seen) * rate)
        client.seen = now
        if self.at_once and client.replies + replies > self.at_once:
            raise TooMany(f"You have {client.replies} replies in the making and may have {self.at_once}.", 2)
        if self.per_minute and client.tokens < asks:
            wait = math.ceil((asks - client.tokens) / rate)
            raise TooMany(f"You may ask {self.per_minute} times a minute: wait {wait} seconds.", wait)
        client.tokens -= asks
        client.replies += replies

    def leave(self, address: str, replies: int) -> None:
        """So many of a client's replies are over."""
        if address in self.seen:
            self.seen[address].replies = max(0, self.seen[address].replies - replies)

    def _forget(self) -> None:
        idle = (address for address, client in self.seen.items() if not client.replies)
        while len(self.seen) > REMEMBERED and (address := next(idle, None)) is not None:
            del self.seen[address]
            idle = (address for address, client in self.seen.items() if not client.replies)
