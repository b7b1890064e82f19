"""Folders of pictures: read as written, drawn from a run once, refused when two methods do not fit each other."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compose import config
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from lora_dae.config import ConfigError, to_dict
from lora_dae.evaluation import folders, pictures
from lora_dae.evaluation.pictures import Item, gather, parse_spec, read_pictures, write_pictures

CONSOLE = Console(quiet=True)


def _image(number: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _items(n: int = 3) -> list[Item]:
    return [Item(f"{i:04d}", f"a red shirt {i}", {"color": "red"}, None, _image(90 + i), 7) for i in range(n)]


def _write(folder: Path, items: list[Item] | None = None, size: int = 16) -> Path:
    items = items or _items()
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder, items, [_image(hash(folder.name) % 1000 + i, size) for i in range(len(items))])
    return folder


@pytest.fixture(scope="module")
def run_dir(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter is empty: the frozen backbone drawing from captions."""
    root = tmp_path_factory.mktemp("runs")
    overrides = ("conditioning=none", "data.resolution=32", "enhancement=none", "data.test_size=3")
    cfg = config(tiny_backbone, root / "run", root / "cache", *overrides)
    (root / "run" / "adapter").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(to_dict(cfg)), root / "run" / "config.yaml")
    return root / "run"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    items = [replace(_items(1)[0], source=_image(5))]
    write_pictures(tmp_path, items, [_image(0)])
    (item,), (image,) = read_pictures(tmp_path)
    assert np.array_equal(image, _image(0)) and item.source is not None and item.real is not None
    assert np.array_equal(item.source, _image(5)) and np.array_equal(item.real, _image(90))
    assert (item.id, item.prompt, item.attributes, item.seed) == ("0000", "a red shirt 0", {"color": "red"}, 7)


def test_a_run_is_drawn_once_and_again_after_a_change(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gather([f"run={run_dir}"], "test", 3, CONSOLE)
    assert [i.prompt for i in first.items] == [
        i.prompt for i in read_pictures(next((run_dir / "pictures").iterdir()))[0]
    ]
    assert first.methods["run"][0].shape == (32, 32, 3) and first.items[0].real is not None

    def fails(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(pictures, "load_run", fails)
    again = gather([str(run_dir)], "test", 3, CONSOLE)
    assert all(np.array_equal(a, b) for a, b in zip(first.methods["run"], again.methods["run"], strict=True))
    (run_dir / "adapter" / "new.safetensors").write_bytes(b"other weights")
    with pytest.raises(AssertionError, match="drawn again"):
        gather([str(run_dir)], "test", 3, CONSOLE)
    with pytest.raises(ConfigError, match="without enhancement"):
        gather([f"{run_dir}@0.5"], "test", 3, CONSOLE)


def test_fewer_pictures_than_are_drawn_are_read_and_more_than_a_run_has_are_rendered(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = gather([str(run_dir)], "test", 3, CONSOLE)

    def fails(*_: object) -> None:
        raise AssertionError("drawn again")

    with monkeypatch.context() as patched:
        patched.setattr(pictures, "load_run", fails)
        for count in (2, 3):
            again = gather([str(run_dir)], "test", count, CONSOLE).methods["run"]
            assert len(again) == count
            assert all(np.array_equal(a, b) for a, b in zip(again, three.methods["run"], strict=False))
    five = gather([str(run_dir)], "test", 5, CONSOLE).items  # its studio has three test pairs
    assert len(five) == 5 and [i.prompt for i in five[:3]] == [i.prompt for i in three.items]


def test_finished_folders_are_taken_whole_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", [replace(_items(1)[0], id=f"{k:04d}") for k in range(130)])
    said = io.StringIO()
    assert len(gather([str(folder)], "test", None, Console(file=said)).items) == 130 and said.getvalue() == ""
    assert len(gather([str(folder)], "test", 20, Console(file=said)).items) == 20
    assert said.getvalue() == "a: 20 of 130 pictures\n"


def test_what_only_a_later_method_knows_is_kept(tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    known = [replace(item, source=_image(40 + k), mask=mask) for k, item in enumerate(_items())]
    bare = [replace(item, attributes=None, real=None) for item in known]
    first, later = _write(tmp_path / "a", [replace(item, source=None, mask=None) for item in bare]), tmp_path / "b"
    sets = gather([str(first), str(_write(later, known))], "test", None, CONSOLE)
    for item, expected in zip(sets.items, known, strict=True):
        assert item.attributes == expected.attributes
        for part in ("source", "real", "mask"):
            np.testing.assert_array_equal(getattr(item, part), getattr(expected, part))
    assert sets.from_source == {"b"}


def test_pictures_and_masks_are_read_as_anybodys_folders_are(tmp_path: Path) -> None:
    """Transparent, turned by EXIF, of 16 bits; masks of 0 and 1, and with a palette whose garment is dark."""
    (tmp_path / "mask").mkdir()
    Image.fromarray(np.dstack([_image(1), _image(2)[..., 0]])).save(tmp_path / "0.png")
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.fromarray(_image(3)).save(tmp_path / "1.jpg", exif=turn)
    Image.fromarray(_image(4)[..., 0].astype(np.uint16) * 257).save(tmp_path / "2.png")
    garment = (_image(5)[..., 0] > 127).astype(np.uint8)
    classes = Image.fromarray(garment).convert("P")
    classes.putpalette([0, 0, 0, 128, 0, 0])
    for k, mask in enumerate((Image.fromarray(garment), classes, Image.fromarray(garment * 255))):
        mask.save(tmp_path / "mask" / f"{k}.png")
    rows = [{"file_name": name, "text": "a hat", "mask": f"mask/{name[0]}.png"} for name in ("0.png", "1.jpg", "2.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items, images = read_pictures(tmp_path)
    for image, same in zip(images, folders.read(folders.scan("images", tmp_path), range(3), None), strict=True):
        np.testing.assert_array_equal(image, same)
    masks = folders.read_masks(folders.scan("masks", tmp_path / "mask"), range(3), None)
    for item, same in zip(items, masks, strict=True):
        np.testing.assert_array_equal(item.mask, same)
        np.testing.assert_array_equal(item.mask, garment * 255)


def test_methods_are_named_by_folder_strength_or_by_hand() -> None:
    assert parse_spec("runs/a") == ("a", Path("runs/a"), None)
    assert parse_spec("runs/a@0.5") == ("a @0.5", Path("runs/a"), 0.5)
    assert parse_spec("ours=runs/rank=16/a@1") == ("ours", Path("runs/rank=16/a"), 1.0)
    assert parse_spec("runs/rank=16/a")[1] == Path("runs/rank=16/a")


def test_methods_that_do_not_fit_are_told(tmp_path: Path) -> None:
    a = _write(tmp_path / "a")
    other_prompt = _write(tmp_path / "b", [*_items()[:2], replace(_items()[2], prompt="a blue dress")])
    other_seed = _write(tmp_path / "c", [replace(i, seed=8) for i in _items()])
    fewer = _write(tmp_path / "d", _items(2))
    larger = _write(tmp_path / "e", size=20)
    other_photo = _write(tmp_path / "g", [replace(i, real=_image(500)) for i in _items()])
    nothing = tmp_path / "f"
    nothing.mkdir()
    for specs, message in (
        ([a, other_prompt], "differ in prompt 0002"),
        ([a, other_seed], "seed 8"),
        ([a, fewer], "has 2 pictures and a 3"),
        ([a, larger], "16 x 16, 20 x 20"),
        ([a, other_photo], "another real photo for 0000"),
        ([a, a], "one name"),
        ([nothing], "neither a run nor"),
        ([tmp_path / "absent"], "does not exist"),
        ([f"{a}@1"], "for a run only"),
        ([], "names no method"),
    ):
        with pytest.raises(ConfigError, match=message):
            gather([str(s) for s in specs], "test", 3, CONSOLE)
    with pytest.raises(ConfigError, match="split=train"):
        gather([str(a)], "train", 3, CONSOLE)


def test_broken_metadata_names_its_line(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a")
    path = folder / "metadata.jsonl"
    good = path.read_text().splitlines()
    for bad, message in (
        ("{", "line 2 is no JSON"),
        ('{"file_name": "0000.png"}', 'line 2 needs "file_name" and "text"'),
        (json.dumps({"file_name": "0000.png", "text": "a", "real": 7}), "line 2: .* must be file names"),
        (json.dumps({"file_name": "0000.png", "text": "a", "attributes": "red"}), '"attributes" an object'),
        (json.dumps({"file_name": "absent.png", "text": "a"}), "absent.png cannot be read"),
        (json.dumps({"file_name": "metadata.jsonl", "text": "a"}), "metadata.jsonl cannot be read"),
    ):
        path.write_text("\n".join([good[0], bad]))
        with pytest.raises(ConfigError, match=message):
            read_pictures(folder)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no picture"):
        read_pictures(folder)
