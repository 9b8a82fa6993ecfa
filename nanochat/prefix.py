"""One forward over what several rows begin with, then one over their endings: two `cache` arguments of GPT.forward.

`Prefixes` remembers the keys and values of right-padded beginnings, one an item; `Endings` lets rows stand behind them,
each behind its own item's. Used where choices of one question are scored (core_eval); generating is kvcache's.

Shape letters: N items, P positions of the longest beginning, B rows, T positions of the longest ending, H heads, Hkv
key/value heads, D head dim, C width.
"""

import torch
from torch.nn import functional as F


class Prefixes:
    """The first forward: model(ids (N, P), cache=Prefixes(lengths, attend)). lengths: each beginning's, at least 1."""

    def __init__(self, lengths: list[int], attend):
        self.lengths, self.attend_plainly = torch.tensor(lengths), attend
        self.keys: list[torch.Tensor] = []  # of each layer, (N, P, Hkv, D)
        self.values: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None  # (N, C) the newest token's embedding, for the smear

    def positions(self, rows: int, new: int) -> torch.Tensor:
        return torch.arange(new).expand(rows, new)

    def previous(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x[torch.arange(x.size(0)), self.lengths - 1]
        return torch.zeros_like(x[:, :1])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        self.keys.append(k)
        self.values.append(v)
        return self.attend_plainly(q, k, v, window)


class Endings:
    """The second: model(ids (B, T), cache=Endings(prefixes, owners, context)). owners: the item of each row.

    Short endings are padded to the longest; where that would lie past the context, a position of the context stands in.
    """

    def __init__(self, prefixes: Prefixes, owners: list[int], context: int):
        self.prefixes, self.owners, self.context = prefixes, torch.tensor(owners), context
        self.before = prefixes.lengths[self.owners].unsqueeze(1)  # (B, 1)
        self.masks: dict[int, torch.Tensor] = {}

    def positions(self, rows: int, new: int) -> torch.Tensor:
        return (self.before + torch.arange(new)).clamp(max=self.context - 1)

    def previous(self, x: torch.Tensor) -> torch.Tensor:
        return self.prefixes.last[self.owners.to(x.device)].unsqueeze(1)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        owners = self.owners.to(q.device)
        keys = torch.cat([self.prefixes.keys[layer][owners], k], dim=1)  # (B, P + T, Hkv, D)
        values = torch.cat([self.prefixes.values[layer][owners], v], dim=1)
        if window not in self.masks:
            self.masks[window] = self._mask(keys.size(1) - k.size(1), k.size(1), window).to(q.device)
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        gqa = q.size(1) != keys.size(1)
        return F.scaled_dot_product_attention(q, keys, values, self.masks[window], enable_gqa=gqa).transpose(1, 2)

    def _mask(self, old: int, new: int, window: int) -> torch.Tensor:
        """(B, 1, T, P + T) bool: each row sees its own beginning without the padding, and its own tokens so far."""
        query = (self.before + torch.arange(new)).unsqueeze(2)  # (B, T, 1) absolute positions
        first = torch.arange(old).expand(len(self.owners), old)
        key = torch.cat([first, self.before + torch.arange(new)], dim=1).unsqueeze(1)  # (B, 1, P + T)
        real = torch.cat([first < self.before, torch.ones(len(self.owners), new, dtype=torch.bool)], dim=1).unsqueeze(1)
        return (real & (key <= query) & (key >= query - window)).unsqueeze(1)
