"""Source photos for some of the photos: ignored where captions train alone, or pairs of those that have one."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_photos
from rich.console import Console

from lora_dae.config import Config, ConfigError, DataConfig
from lora_dae.data import sources
from lora_dae.data.__main__ import data_config, main
from lora_dae.data.inspect import print_survey, survey
from lora_dae.data.photos import PhotoPairs
from lora_dae.data.sources import check_source, load_photos
from lora_dae.sweep.identity import training_part

WITH_SOURCE = [f"00{number}.png" for number in range(4)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 photos; 4 of them have a source photo in source/."""
    root = tmp_path / "photos"
    write_photos(root, 12)
    (root / "source").mkdir()
    for name in WITH_SOURCE:
        shutil.copy(root / "images" / name, root / "source" / name)
    sources.say_once.cache_clear()  # what was said once is not said again
    return root


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="folder", root=str(root), resolution=32, cache_dir=str(root.parent / "cache"), **changes)


def ids(splits: Mapping[str, PhotoPairs]) -> list[str]:
    return sorted(entry.id for split in splits.values() for entry in split.entries)


def test_captions_alone_train_on_all_photos_and_no_source(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly what they train on where nobody has a source photo; that is said once."""
    splits = load_photos(config(root))
    assert ids(splits) == [f"{number:03d}.png" for number in range(12)]
    assert not any(split.has_source for split in splits.values())
    assert all(split[k].source is None for split in splits.values() for k in range(len(split)))
    check_source(Config(data=config(root), conditioning="none"), splits["train"])
    assert "8 of 12 photos have no source photo (the first: " in capsys.readouterr().err
    load_photos(config(root))
    assert capsys.readouterr().err == ""
    shutil.rmtree(root / "source")
    assert load_photos(config(root))["train"].fingerprint == splits["train"].fingerprint


def test_pairs_are_refused_in_a_sentence_that_names_the_option(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"only 4 in .*photos have: .*data\.missing_source=drop") as caught:
        check_source(Config(data=config(root), conditioning="source"), load_photos(config(root))["train"])
    assert "\n" not in str(caught.value)


def test_photos_without_a_source_are_dropped_if_asked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(root, missing_source="drop")
    splits = load_photos(cfg)
    assert ids(splits) == WITH_SOURCE
    assert all(split[k].source is not None for split in splits.values() for k in range(len(split)))
    check_source(Config(data=cfg, conditioning="source"), splits["train"])
    assert "8 of 12 photos have no source photo and are left out" in capsys.readouterr().err


def test_inspect_counts_them(root: Path, tmp_path: Path) -> None:
    found = survey(config(root))
    assert sorted(item.id for item in found.items if item.paired) == WITH_SOURCE
    console = Console(file=io.StringIO(), width=160)
    print_survey(found, console)
    count = sum(item.paired for item in found.of("train"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert count > 0 and re.search(rf"with source\W+{count} \(", text)
    arguments = ["inspect", "--to", str(tmp_path / "sheet.html"), "data=folder", f"data.root={root}"]
    main([*arguments, "data.resolution=32", f"data.cache_dir={tmp_path / 'cache'}"])
    assert (tmp_path / "sheet.html").is_file()


def test_another_word_for_the_option_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="data.missing_source=maybe is unknown: use one of error, drop"):
        data_config(["data=folder", f"data.root={root}", "data.missing_source=maybe"])


def test_trainings_from_before_the_option_are_found_and_dropping_is_another_one() -> None:
    one = Config(run_dir="here")
    assert "missing_source" not in training_part(one)["data"]
    assert training_part(one) != training_part(replace(one, data=replace(one.data, missing_source="drop")))
