"""``python -m benchmarks.ddp``: two processes that train together against two that train alone, in one session.

Each process has one thread, so on two cores nothing but the exchange of gradients differs. Both kinds run in turns; the
figure is the ratio of their median step times. Then what follows for 8 x 8 GPUs, by arithmetic: see projection().
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.__main__ import studio_unet
from benchmarks.models import as_trained
from lora_dae.adapter.inject import trainable_parameters
from lora_dae.config import AdapterConfig

BATCH = 4


def projection(
    gradient_bytes: float,
    nodes: int = 8,
    gpus: int = 8,
    inside: float = 150e9,
    between: float = 10e9,
    latency: float = 20e-6,
) -> float:
    """Seconds of one reduction over ``nodes`` x ``gpus``: inside the nodes, between them, and back inside.

    A ring over n members sends 2 (n - 1) / n of the bytes in 2 (n - 1) messages. Between nodes each GPU carries the
    share of the bytes that the reduction inside left to it, over its own part of the node's network. Bandwidths in
    bytes per second (NVLink; a 100 Gbit/s card per node, less overhead, shared by its GPUs), latency in seconds.
    """
    ring_inside = 2 * (gpus - 1) / gpus * gradient_bytes / inside + 2 * (gpus - 1) * latency
    ring_between = 2 * (nodes - 1) / nodes * gradient_bytes / between + 2 * (nodes - 1) * latency
    return ring_inside + ring_between


def _train(rank: int, together: bool, port: int, steps: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=5))
    unet = as_trained(studio_unet(), AdapterConfig(), in_place=True)
    model: nn.Module = DistributedDataParallel(unet) if together else unet
    trained = trainable_parameters(unet)
    optimizer = torch.optim.AdamW(trained.values(), fused=True)
    x = torch.randn(BATCH, unet.config["in_channels"], 32, 32).contiguous(memory_format=torch.channels_last)
    text, t = torch.randn(BATCH, 32, unet.config["cross_attention_dim"]), torch.randint(0, 1000, (BATCH,))
    seconds = []
    for step in range(steps + 1):
        dist.barrier()  # both kinds begin each step together, so that both have the other's load beside them
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, t, text).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step > 0:
            seconds.append(time.perf_counter() - start)
    pipe.send((statistics.median(seconds), sum(p.numel() * p.element_size() for p in trained.values())))
    dist.destroy_process_group()


def measure(together: bool, steps: int) -> tuple[float, int]:
    """(median seconds of a step, bytes of gradients) of two processes. Raises RuntimeError where one of them dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [context.Process(target=_train, args=(r, together, port, steps, pipes[r][1])) for r in range(2)]
    for process, (_, sending) in zip(processes, pipes, strict=True):
        process.start()
        sending.close()  # the process has its own: with a second one open, its death would never be noticed
    waiting, told = [receiving for receiving, _ in pipes], []
    try:
        while waiting:
            for receiving in wait(waiting):
                told.append(receiving.recv())
                waiting.remove(receiving)
    except EOFError as error:
        raise RuntimeError("one of the two processes died: see what it printed.") from error
    finally:
        for process in processes:
            if waiting:  # for one that died: the other would wait for it, too
                process.terminate()
            process.join()
    return max(seconds for seconds, _ in told), told[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ddp", description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    console = Console(highlight=False)
    alone, pair, size = [], [], 0
    for _ in range(given.repeats):
        alone.append(measure(False, given.steps)[0])
        seconds, size = measure(True, given.steps)
        pair.append(seconds)
    step, both = statistics.median(alone), statistics.median(pair)
    console.print(f"gradients             {size / 1e6:.2f} MB a step")
    console.print(f"step, alone           {step:.3f} s")
    console.print(f"step, together        {both:.3f} s")
    console.print(f"efficiency of two     {step / both:.3f}")
    for name, count in (("this adapter", size), ("SDXL, rank 16, attention and convolutions", 160e6)):
        console.print(f"reduction over 8 x 8  {1e3 * projection(count):.1f} ms for {count / 1e6:.1f} MB ({name})")


if __name__ == "__main__":
    main()
