"""``python -m benchmarks.study_load``: many raters at once against the study's server on the loopback.

Every rater consents, loads the pictures of each trial and votes; the time of every request is noted. The page promises
99 % below 200 ms with 200 raters on 2 cores; a person votes every few seconds, here one does after ``--pause``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from lora_dae.evaluation.pictures import Item, write_pictures
from lora_dae.study.create import CreateRequest, create_study


async def request(port: int, path: str, body: dict[str, object] | None, seconds: list[float]) -> dict[str, object]:
    """One HTTP request on a connection of its own; JSON of the answer, {} for a picture."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    head = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    head += [] if body is None else ["Content-Type: application/json", "X-Study: 1", f"Content-Length: {len(data)}"]
    writer.write("\r\n".join([*head, "", ""]).encode() + data)
    answer = await reader.read()
    writer.close()
    seconds.append(time.perf_counter() - start)
    status = answer.split(b" ", 2)[1]
    assert status == b"200", answer[:200]
    return json.loads(answer.split(b"\r\n\r\n", 1)[1]) if b"json" in answer[:600] else {}


async def rater(port: int, token: str, pause: float, votes: list[float], others: list[float]) -> None:
    await asyncio.sleep(random.uniform(0, pause))
    state = await request(port, f"/api/{token}/consent", {"language": "en"}, others)
    while state["state"] == "trial":
        for side in ("left", "right", "reference"):
            if state[side]:
                await request(port, str(state[side]), None, others)
        await asyncio.sleep(random.uniform(0.5, 1.5) * pause)
        answer = "3" if state["kind"] == "opinion" else "left"
        state = await request(port, f"/api/{token}/vote", {"trial": state["trial"], "answer": answer, "ms": 5}, votes)


async def load(port: int, tokens: list[str], pause: float) -> tuple[list[float], list[float]]:
    votes: list[float] = []
    others: list[float] = []
    await asyncio.gather(*(rater(port, token, pause, votes, others) for token in tokens))
    return votes, others


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_load", description=__doc__)
    parser.add_argument("--raters", type=int, default=200)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between a rater's votes, on average")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(8)]
        items = [Item(str(k), "a red shirt", None, image, image) for k, image in enumerate(images)]
        for method in ("a", "b"):
            write_pictures(root / method, items, images)
        runs = [f"{root}/a", f"{root}/b"]
        asked = CreateRequest(runs, f"{root}/study", raters=args.raters, pairs=args.trials, opinions=0)
        study = create_study(asked, Console(quiet=True))
        tokens = [line.split("/")[-1] for line in (study / "links.txt").read_text().split("\n")[1:] if line]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, "-m", "lora_dae.study", "serve", f"study={study}", f"port={port}"])
        try:
            for _ in range(300):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            start = time.perf_counter()
            votes, others = asyncio.run(load(port, tokens, args.pause))
            wall = time.perf_counter() - start
        finally:
            server.kill()
            server.wait()
    for label, seconds in (("votes", votes), ("pages and pictures", others)):
        cuts = statistics.quantiles(seconds, n=100)
        print(
            f"{label}: {len(seconds)} in {wall:.0f} s, median {cuts[49] * 1e3:.0f} ms, "
            f"99 % below {cuts[98] * 1e3:.0f} ms, slowest {max(seconds) * 1e3:.0f} ms"
        )


if __name__ == "__main__":
    main()
