"""Looking at the data: counts that are right, duplicates and outliers that are found, a sheet that stands alone."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.__main__ import main
from lora_dae.data.inspect import check_duplicates, print_survey, survey


def scene(seed: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    """Smooth blobs, as photos have: scaling and JPEG keep what they look like."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 200, (6, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 photos: 14 train, 6 test."""
    root = tmp_path / "photos"
    root.mkdir()
    rows = []
    for number in range(20):
        scene(number).save(root / f"{number}.png")
        text = "a red dress" if number % 2 else "a red hat, red and blue"
        rows.append({"file_name": f"{number}.png", "text": text, "split": "test" if number >= 14 else "train"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def config(root: Path) -> DataConfig:
    return DataConfig(name="folder", root=str(root), resolution=64, cache_dir=str(root.parent / "cache"))


def test_counts(root: Path) -> None:
    found = survey(config(root))
    assert len(found.of("test")) == 6 and len(found.of("train")) + len(found.of("val")) == 14
    assert dict(found.words) == {"red": 30, "dress": 10, "hat": 10, "blue": 10}  # "a" and "and" are no news
    assert not found.duplicates and not found.outliers
    console = Console(file=io.StringIO(), width=120)
    print_survey(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"width x height, median\W+60x80", text) and "64x64 20" in text


def test_a_photo_in_two_splits_is_found_though_it_was_scaled_and_recoded(root: Path) -> None:
    train = next(item.id for item in survey(config(root)).of("train"))
    copy = Image.open(root / train).resize((45, 60), Image.Resampling.LANCZOS)
    copy.save(root / "15.png")
    found = survey(config(root))
    assert [(a.id, b.id) for a, b in found.duplicates] == [(train, "15.png")]
    with pytest.raises(ConfigError, match=f"{train} of train = 15.png of test"):
        check_duplicates(found)


def test_unusual_photos_are_found(root: Path) -> None:
    Image.new("RGB", (60, 80), (2, 2, 2)).save(root / "3.png")
    Image.new("RGB", (60, 80), (255, 20, 130)).save(root / "4.png")
    reasons = {item.id: why for item, why in survey(config(root)).outliers}
    assert set(reasons) == {"3.png", "4.png"} and reasons["3.png"].startswith("brightness 2, usually")


def test_masks_without_a_garment_are_counted(root: Path) -> None:
    (root / "mask").mkdir()
    for number in range(20):
        mask = np.zeros((80, 60), np.uint8)
        mask[20:60] = {3: 0, 4: 38}.get(number, 255)  # 38 is the luma of VOC's first color
        Image.fromarray(mask).save(root / "mask" / f"{number}.png")
    found = survey(config(root))
    assert sorted(item.id for item in found.empty_masks) == ["3.png", "4.png"]
    console = Console(file=io.StringIO(), width=120)
    print_survey(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in text.splitlines() if "masks without a garment" in line)
    assert sum(int(count) for count in re.findall(r"(\d+)(?: \(|\s)", row)) == 2


def test_the_command_writes_a_sheet_that_stands_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scene(0).save(root / "17.png")
    row = '\n{"file_name": "0.png", "text": "<script>alert(1)</script>", "split": "test", "group_id": "x"}'
    with (root / "metadata.jsonl").open("a") as file:
        file.write(row)
    arguments = ["inspect", "--to", str(tmp_path / "sheet.html"), "data=folder", f"data.root={root}"]
    arguments += ["data.resolution=64", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    assert "are in another split too" in captured.err and "What will be trained on" in captured.out
    html = (tmp_path / "sheet.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html  # captions are text, not markup
    assert not re.search(r'(src|href)="(?!data:)', html) and html.count("data:image/jpeg") >= 20
    main([*arguments, "--allow-duplicates"])
