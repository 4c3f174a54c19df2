"""A key and value cache of a known size for transformers; imported only where torch is there.

transformers' own grows by concatenation: every chunk allocates each layer anew, a little larger,
which left a process at several times what it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, (1, kv heads, tokens, head_dim), in place."""

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__()
        self._capacity_tokens = capacity_tokens
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends and returns all keys and values so far."""
        if self._room is None:
            shape = (*key_states.shape[:2], self._capacity_tokens, key_states.shape[3])
            self._room = key_states.new_empty(shape), value_states.new_empty(shape)
            self.is_initialized = True
            self.keys, self.values = (room[..., :0, :] for room in self._room)
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if stop > self._capacity_tokens:
            raise ValueError(f"{stop} tokens in a cache of {self._capacity_tokens}")
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., start:stop, :] = states
        self.keys, self.values = (room[..., :stop, :] for room in self._room)
        return self.keys, self.values

    def keep(self, count: int) -> None:
        """Forgets all but the first ``count`` tokens."""
        if self._room is None or count > self.keys.shape[-2]:
            raise ValueError(f"{count} tokens to keep, which were not fed")
        self.keys, self.values = (room[..., :count, :] for room in self._room)


def reserve(layers: int, capacity_tokens: int) -> Any:
    """An empty cache for so many layers and tokens."""
    return Cache(layers=[ReservedLayer(capacity_tokens) for _ in range(layers)])
