"""Masks for photos that came without: drawn beside the data, once, on the photo that they belong to."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tflite_models import write_segmenter

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data import masks
from lora_dae.data.__main__ import data_config, main
from lora_dae.data.masks import check_garments, choose, decode_mask, fill_masks, mask_path, mediapipe_segmenter
from lora_dae.data.sources import list_entries, load_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photos, 60 x 80, of a bright garment in another place each; the first lies on its side (EXIF)."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    rows = []
    for number in range(8):
        pixels = np.full((80, 60, 3), 20, np.uint8)
        pixels[30:60, 5 + 3 * number : 25 + 3 * number] = 240
        name = f"sub/{number}.png"
        exif = Image.Exif()
        photo = Image.fromarray(pixels)
        if number == 0:
            exif[0x0112] = 6
            photo = photo.transpose(Image.Transpose.ROTATE_90)
        photo.save(root / name, exif=exif)
        rows.append({"file_name": name, "text": "a shirt"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def bright(photo: np.ndarray) -> np.ndarray:
    """A segmenter for garments brighter than their surroundings."""
    return photo.mean(axis=-1) > 128


def config(root: Path, **changes: object) -> DataConfig:
    cache = root.parent / "cache"
    return DataConfig(name="folder", root=str(root), resolution=64, cache_dir=str(cache), **changes)  # type: ignore[arg-type]


VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # the first colors of PASCAL VOC's palette, which CVAT writes too


def as_written(shown: np.ndarray, kind: str) -> Image.Image:
    """A mask, bool (H, W), in the form that a tool writes."""
    if kind == "one_bit":
        return Image.fromarray(shown)
    if kind == "soft":  # edges, and what a lossy format leaves of black and white
        return Image.fromarray(np.where(shown, 230, 20).astype(np.uint8))
    number = {"class_2": 2, "gray_palette": 255}.get(kind, 1)
    numbers = Image.fromarray((~shown if kind == "white_first" else shown * number).astype(np.uint8))
    if kind == "zero_one":
        return numbers
    palette = numbers.convert("P")  # as it stands: a palette of grays, number for number
    if kind == "white_first":
        palette.putpalette([255, 255, 255, 0, 0, 0])
    elif kind != "gray_palette":
        palette.putpalette(VOC)
    return palette


def put_masks(root: Path, kind: str) -> None:
    """The garments of ``photos``, upright, into its folder ``mask``."""
    (root / "mask" / "sub").mkdir(parents=True)
    for path in sorted((root / "sub").iterdir()):
        with Image.open(path) as photo:
            shown = bright(np.asarray(ImageOps.exif_transpose(photo)))
        as_written(shown, kind).save(root / "mask" / "sub" / path.name)


def files_of(root: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))


def test_masks_lie_beside_the_data_and_on_their_garments(photos: Path, tmp_path: Path) -> None:
    before = files_of(photos)
    cfg = config(photos)
    assert fill_masks(list_entries(cfg), tmp_path / "masks", bright) == (8, [])
    assert files_of(photos) == before
    splits = load_photos(config(photos, masks=str(tmp_path / "masks"), buckets=["48x64"], bucket_step=16))
    pairs = [split[i] for split in splits.values() for i in range(len(split))]
    assert len(pairs) == 8 and splits["train"].has_mask
    for pair in pairs:
        assert set(np.unique(pair.mask)) == {0, 255}
        assert ((pair.mask > 0) == bright(pair.image)).mean() > 0.98
    assert {pair.size for pair in (splits["train"][i] for i in range(len(splits["train"])))} == {(64, 48)}


def test_what_is_drawn_is_not_drawn_again_and_empty_ones_are_told(photos: Path, tmp_path: Path) -> None:
    entries, asked = list_entries(config(photos)), []

    def dies(photo: np.ndarray) -> np.ndarray:
        asked.append(photo.shape)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return np.zeros(photo.shape[:2], bool)

    with pytest.raises(KeyboardInterrupt):
        fill_masks(entries, tmp_path / "masks", dies)
    assert fill_masks(entries, tmp_path / "masks", dies) == (8, [f"sub/{k}.png" for k in range(3, 8)])
    assert len(asked) == 9 and asked[0] == (80, 60, 3)  # upright
    (photos / "sub" / "0.png").write_bytes(b"broken")
    mask_path(tmp_path / "masks", "sub/0.png").unlink()
    assert fill_masks(entries, tmp_path / "masks", bright) == (7, [])


KINDS = ["zero_one", "one_bit", "soft", "voc", "class_2", "gray_palette", "white_first"]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_mean_what_the_tools_that_write_them_mean(kind: str) -> None:
    """0 and 1, a class's number in a palette of colors (its first two have luma 38 and 75), else what is bright."""
    shown = np.random.default_rng(0).random((24, 16)) > 0.6
    file = io.BytesIO()
    as_written(shown, kind).save(file, "PNG")
    np.testing.assert_array_equal(np.asarray(decode_mask(file.getvalue())) >= 128, shown)


@pytest.mark.parametrize("buckets", [[], ["48x64"]], ids=["squares", "buckets"])
@pytest.mark.parametrize("kind", ["zero_one", "voc"])
def test_masks_of_classes_lie_on_their_garments(kind: str, buckets: list[str], photos: Path) -> None:
    put_masks(photos, kind)
    splits = load_photos(config(photos, buckets=buckets, bucket_step=16))
    pairs = [split[i] for split in splits.values() for i in range(len(split))]
    assert len(pairs) == 8
    for pair in pairs:
        assert set(np.unique(pair.mask)) == {0, 255}
        assert ((pair.mask > 0) == bright(pair.image)).mean() > 0.97
    check_garments(splits["train"], config(photos))


def test_masks_that_nowhere_show_a_garment_are_refused(photos: Path) -> None:
    """The colors of classes without their palette: what is dark is no garment. One that shows it is enough."""
    put_masks(photos, "voc")
    masks_of = {path: Image.open(path).convert("RGB") for path in (photos / "mask" / "sub").iterdir()}
    for path, mask in masks_of.items():
        mask.save(path)
    train = load_photos(config(photos))["train"]
    with pytest.raises(ConfigError, match=f"none of {len(train)} garment masks looked at in .*white or 1 on black"):
        check_garments(train, config(photos))
    Image.new("L", (60, 80), 255).save(photos / "mask" / train.entries[-1].id)
    check_garments(load_photos(config(photos))["train"], config(photos))


def test_a_mask_of_another_photo_is_not_used_and_drawn_anew(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two photos change places under their ids, as rows do where one is inserted before them."""

    def exchange() -> None:
        third, fourth = photos / "sub" / "3.png", photos / "sub" / "4.png"
        third.rename(tmp_path / "kept.png")
        fourth.rename(third)
        (tmp_path / "kept.png").rename(fourth)

    folder, asked = tmp_path / "masks", []
    entries, cfg = list_entries(config(photos)), config(photos, masks=str(folder))

    def noted(photo: np.ndarray) -> np.ndarray:
        asked.append(photo.shape)
        return bright(photo)

    fill_masks(entries, folder, bright)
    load_photos(cfg)
    assert "were drawn on other photos" not in capsys.readouterr().err
    exchange()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"2 unusable of 16 files.*3.png.png was drawn on another photo than"):
            load_photos(cfg)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("2 of 8 masks in") == 1 and "python -m lora_dae.data masks --to" in said
    assert fill_masks(entries, folder, noted) == (8, []) and len(asked) == 2
    for split in load_photos(cfg).values():
        for pair in (split[i] for i in range(len(split))):
            assert ((pair.mask > 0) == bright(pair.image)).mean() > 0.97
    (folder / "index.jsonl").unlink()  # a folder from before there was one is taken as it is
    exchange()
    assert sum(map(len, load_photos(cfg).values())) == 8
    assert fill_masks(entries, folder, noted) == (8, []) and len(asked) == 2


def test_a_folder_holds_masks_of_one_part(photos: Path, tmp_path: Path) -> None:
    entries = list_entries(config(photos))
    fill_masks(entries, tmp_path / "masks", bright)
    with pytest.raises(ConfigError, match="holds masks of the garment: give those of --part person another folder"):
        fill_masks(entries, tmp_path / "masks", bright, part="person")
    assert fill_masks(entries, tmp_path / "persons", bright, part="person") == (8, [])


def test_own_masks_go_first_and_missing_ones_are_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder: write it with python -m lora_dae.data masks"):
        load_photos(config(photos, masks=str(tmp_path / "nowhere")))
    (photos / "mask" / "sub").mkdir(parents=True)
    Image.new("L", (60, 80), 255).save(photos / "mask" / "sub" / "3.png")
    assert fill_masks(list_entries(config(photos)), tmp_path / "masks", bright) == (7, [])
    splits = load_photos(config(photos, masks=str(tmp_path / "masks")))
    found = {pair.id: pair.mask for split in splits.values() for pair in (split[i] for i in range(len(split)))}
    assert (found["sub/3.png"] > 0).mean() > 0.7 and (found["sub/4.png"] > 0).mean() < 0.3
    mask_path(tmp_path / "masks", "sub/4.png").unlink()
    with pytest.raises(ConfigError, match=r"sub/4.png.png is missing \(named by .*line 5\)"):
        load_photos(config(photos, masks=str(tmp_path / "masks")))
    for source in ("studio", "shards"):
        with pytest.raises(ConfigError, match="leave data.masks out"):
            data_config([f"data={source}", "data.root=somewhere", "data.masks=masks"])


def test_a_mask_never_leaves_its_folder() -> None:
    folder = Path("masks")
    for id in ("../photos/a.jpg", "/photos/a.jpg", "a/../../b.jpg", "x" * 255, "é" * 120 + ".jpg"):
        path = mask_path(folder, id)
        assert ".." not in path.parts and path.is_relative_to(folder) and len(path.name.encode()) <= 255
    assert mask_path(folder, "a.jpg") != mask_path(folder, "a.png")


def test_the_command(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = {"person": bright, "garment": bright}
    monkeypatch.setattr(masks, "mediapipe_segmenter", lambda model, part: nullcontext(fake[part]))
    command = ["masks", "--model", "model.tflite", "--part", "person", "data=folder", f"data.root={photos}"]
    main([*command, "--to", str(tmp_path / "masks")])
    assert "8 masks in" in " ".join(capsys.readouterr().out.split())
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 8
    with pytest.raises(SystemExit):
        main([*command, "--to", str(tmp_path / "masks"), "--part", "garment"])
    assert "holds masks of the person" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        main([*command, "--to", str(photos / "mask")])
    assert "which is only read: choose another folder" in capsys.readouterr().err


def test_what_mediapipe_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        with mediapipe_segmenter(tmp_path / "model.tflite", "garment"):
            pass

    with pytest.raises(ConfigError, match="download selfie_multiclass_256x256.tflite"):
        start()
    (tmp_path / "model.tflite").write_bytes(b"no model")
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ConfigError, match=r"lora-dae\[masks\]"):
        start()


def test_classes_become_masks() -> None:
    """Of three pixels one is background, one skin, one clothes."""
    shares = np.zeros((6, 1, 3))
    shares[0, 0, 0] = shares[2, 0, 1] = shares[4, 0, 2] = 0.9
    assert choose(shares, [], "garment").tolist() == [[False, False, True]]
    assert choose(shares, [], "person").tolist() == [[False, True, True]]
    labels = ["background", "hair", "Upper clothes", "face-skin", "shoes", "others"]
    assert choose(shares, labels, "garment").tolist() == [[False, True, False]]
    assert choose(np.array([[[0.2, 0.6]]]), [], "person").tolist() == [[False, True]]
    with pytest.raises(ConfigError, match="knows no clothes .background, person.*or --part person"):
        choose(shares[:2], ["background", "person"], "garment")


@pytest.mark.skipif(importlib.util.find_spec("mediapipe") is None, reason="needs the masks extra")
def test_mediapipe_itself(photos: Path, tmp_path: Path) -> None:
    """Its own library on a model of one convolution: red is clothes."""
    model = write_segmenter(tmp_path / "model.tflite")
    photo = np.full((80, 60, 3), 10, np.uint8)
    photo[20:50, 10:40] = (250, 20, 20)
    for part in ("garment", "person"):
        with mediapipe_segmenter(model, part) as segment:
            found = segment(photo)
        assert found.shape == (80, 60) and found.dtype == bool
        assert (found == (photo[..., 0] > 128)).mean() > 0.95  # its 32 x 32 logits are enlarged
    main(["masks", "--to", str(tmp_path / "m"), "--model", str(model), "data=folder", f"data.root={photos}"])
    assert len(list((tmp_path / "m").rglob("*.png"))) == 8
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    broken = mediapipe_segmenter(tmp_path / "broken.tflite", "garment")
    with pytest.raises(ConfigError, match="no image segmenter that MediaPipe can load"), broken:
        pass
