"""The processes of one job: rank 0 decides, the others follow, by torchrun and by Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import TCPStore

from lora_dae.config import Config, ConfigError
from lora_dae.sweep import ranks, store


def test_other_ranks_follow_the_decision_of_this_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "decision.json"
    assert ranks.rank() == 0
    ranks.tell(path, False)
    assert not path.exists()  # nobody waits for it
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    ranks.tell(path, False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert ranks.rank() == 1
    assert ranks.ask(path, 5) is False
    monkeypatch.setenv("SLURM_STEP_ID", "1")  # another start: the old decision does not count
    with pytest.raises(ConfigError, match="rank 1 heard nothing"):
        ranks.ask(path, 0.3)


def test_other_ranks_hear_why_rank_0_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They would wait for its decision for a day."""
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("SLURM_NTASKS", "2"), ("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0")):
        monkeypatch.setenv(name, value)

    def refused(path: Path) -> None:
        raise ConfigError(f"cannot lock {path}.")

    monkeypatch.setattr(store, "try_lock", refused)
    path = tmp_path / "decision.json"
    with pytest.raises(ConfigError, match="^cannot lock"):
        store.train_once(Config(run_dir="run"), tmp_path / "store" / "0123", path)
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(ConfigError, match=r"^rank 0 failed: cannot lock .*0123\.lock\.$"):
        ranks.ask(path, 5)


def test_under_torchrun_an_earlier_start_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its default rendezvous has one id and one port for all starts; what its own process keeps ends with it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "0")
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(first.port))
    ranks.tell(tmp_path / "decision.json", False)
    monkeypatch.setenv("RANK", "1")
    assert ranks.ask(tmp_path / "decision.json", 5) is False
    port = first.port
    del first
    again = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert again.port == port
    with pytest.raises(ConfigError, match="rank 1 heard nothing"):
        ranks.ask(tmp_path / "decision.json", 0.3)


def test_under_torchrun_a_failure_is_told_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", kept.port)):
        monkeypatch.setenv(name, str(value))
    ranks.tell_failure(tmp_path / "decision.json", "the disk is full.")
    with pytest.raises(ConfigError, match=r"^rank 0 failed: the disk is full\.$"):
        ranks.ask(tmp_path / "decision.json", 5)


def test_a_process_that_lightning_starts_in_a_task_of_slurm_is_none_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("SLURM_NTASKS", "1"), ("SLURM_PROCID", "0"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert ranks.rank() == 1
