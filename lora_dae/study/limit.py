"""Rate limits in memory: a bucket of requests per key that fills up again."""

from __future__ import annotations

import time

MAX_KEYS = 20_000


class RateLimit:
    """``allow(key)`` is False when more than ``burst`` requests came faster than ``per_second``."""

    def __init__(self, per_second: float, burst: int) -> None:
        self.per_second, self.burst = per_second, burst
        self._levels: dict[str, tuple[float, float]] = {}

    def allow(self, key: str) -> bool:
        now = time.monotonic()
        level, at = self._levels.get(key, (float(self.burst), now))
        level = min(self.burst, level + (now - at) * self.per_second)
        if key not in self._levels and len(self._levels) >= MAX_KEYS:
            self._levels.clear()  # many keys at once are an attack: forgetting is cheaper than growing
        self._levels[key] = (level - 1 if level >= 1 else level, now)
        return level >= 1
