"""Anybody's folders: measured, or refused in one sentence that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from test_evaluation_measure import TinyFeatures

from lora_dae.config import ConfigError, conf_dir
from lora_dae.evaluation import folder_run, folders
from lora_dae.evaluation.command import EvaluateRequest, evaluate
from lora_dae.evaluation.folders import read_masks, scan
from lora_dae.evaluation.metrics.measure import build_reference, measure_images
from lora_dae.evaluation.references import FLOOR


def _picture(number: int, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    """Smooth colors and some noise; (width, height)."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return (0.8 * np.asarray(coarse) + rng.integers(0, 51, (size[1], size[0], 3))).astype(np.uint8)


def _folder(root: Path, first: int, count: int = 6, size: tuple[int, int] = (40, 40), suffix: str = ".png") -> Path:
    root.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(_picture(first + k, size)).save(root / f"{k:02d}{suffix}")
    return root


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders of six pictures; features come from a small network."""
    monkeypatch.setattr(folder_run, "load_features", lambda name: TinyFeatures())
    return _folder(tmp_path / "made", 0), _folder(tmp_path / "real", 100)


def _evaluate(two: tuple[Path, Path], output: Path, *words: str) -> dict:
    options = [f"images={two[0]}", f"reference={two[1]}", f"output={output}", f"cache_dir={output.parent / 'cache'}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("evaluate", [*options, "bootstrap=20", *words])
    evaluate(EvaluateRequest(**OmegaConf.to_container(cfg)), Console(quiet=True))  # type: ignore[arg-type]
    return json.loads((output / "metrics.json").read_text())


def test_two_folders_are_measured_with_references_and_a_page(two: tuple[Path, Path], tmp_path: Path) -> None:
    train = _folder(tmp_path / "train", 200, 8)
    result = _evaluate(two, tmp_path / "out", f"train={train}")
    assert set(result["methods"]["made"]) == {
        "fd_tiny", "kd_tiny", "is_tiny", "power_low", "power_mid", "power_high", "lsd",
    }  # fmt: skip
    assert list(result["references"]) == [FLOOR, "reference, blurred", "reference, over-sharpened"]
    blurred = result["references"]["reference, blurred"]
    assert blurred["power_high"]["value"] < 0.5 < 1.5 < result["references"]["reference, over-sharpened"][
        "power_high"
    ]["value"]  # fmt: skip
    assert blurred["lsd"]["value"] > result["references"][FLOOR]["lsd"]["value"]
    assert result["protocol"]["mode"] == "sets" and result["protocol"]["files"] == "images: 6 .png; reference: 6 .png"
    html = (tmp_path / "out" / "report.html").read_text()
    assert "not known: finished images were given" in html and "Warning: 6 images" in html


def test_pictures_against_themselves_have_no_distance_and_pairs_are_told_by_name(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for file in two[1].iterdir():
        Image.open(file).save(copies / file.name)
    result = _evaluate((copies, two[1]), tmp_path / "out", "paired=true", "controls=false")
    made = result["methods"]["copies"]
    assert made["fd_tiny"]["value"] == pytest.approx(0, abs=1e-6) and made["psnr"]["value"] == 100
    assert result["references"] == {} and result["protocol"]["mode"] == "paired"
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Best and worst by ssim" in html


def _masks(root: Path, size: tuple[int, int] = (40, 40)) -> Path:
    """A garment of another width in each picture; (width, height)."""
    root.mkdir()
    for k in range(6):
        mask = np.zeros((size[1], size[0]), np.uint8)
        mask[8:30, 5 : 20 + 2 * k] = 255
        Image.fromarray(mask).save(root / f"{k:02d}.png")
    return root


def test_masks_of_ones_and_of_classes_are_read_as_those_of_a_run(tmp_path: Path) -> None:
    """0 and 1, and a palette whose garment is dark red, mean the same garment as 0 and 255."""
    whole = _masks(tmp_path / "whole")
    for name in ("ones", "palette"):
        (tmp_path / name).mkdir()
        for file in whole.iterdir():
            classes = Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8))
            if name == "palette":
                classes = classes.convert("P")
                classes.putpalette([0, 0, 0, 128, 0, 0])
            classes.save(tmp_path / name / file.name)
    expected, *found = (
        list(read_masks(scan("masks", tmp_path / name), range(6), None)) for name in ("whole", "ones", "palette")
    )
    for masks in found:
        assert all(np.array_equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert expected[0].max() == 255


def test_masks_give_the_garments_numbers_that_a_run_has(two: tuple[Path, Path], tmp_path: Path) -> None:
    """The same as of a run's pictures in memory; the floor, of which no garment is known, is of whole pictures."""
    masks, train = _masks(tmp_path / "masks"), _folder(tmp_path / "train", 200, 8)
    words = ("paired=true", f"masks={masks}", f"train={train}")
    for output in ("first", "kept"):  # what is kept of the reference is of its garments too
        result = _evaluate(two, tmp_path / output, *words)
        pictures, real, inside = (
            torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())]))
            for folder in (*two, masks)
        )
        network = TinyFeatures()
        against = build_reference(real.permute(0, 3, 1, 2), inside, network)
        expected, _ = measure_images(
            pictures.permute(0, 3, 1, 2), against, network, masks=inside, paired=True, bootstrap=20
        )
        found = result["methods"]["made"]
        assert {"psnr_garment", "edge_f1_garment", "color_garment", "lsd_garment"} <= set(found) == set(expected)
        for name, metric in expected.items():
            assert found[name]["value"] == pytest.approx(metric.value, rel=1e-5), name
    plain = _evaluate(two, tmp_path / "plain", "paired=true", f"train={train}")
    assert result["references"][FLOOR] == plain["references"][FLOOR]
    assert result["methods"]["made"]["lsd_garment"] != plain["methods"]["made"]["lsd"]
    scaled = _evaluate(two, tmp_path / "scaled", *words, "resolution=20")
    assert scaled["methods"]["made"]["psnr_garment"]["value"] > found["psnr_garment"]["value"]  # noise averages out


def test_masks_of_transparent_files_are_dark_there_and_scaled_to_black_and_white(tmp_path: Path) -> None:
    clear = np.full((40, 40, 4), 255, np.uint8)
    clear[:, 20:, 3] = 0
    (tmp_path / "masks").mkdir()
    for k in range(2):
        Image.fromarray(clear).save(tmp_path / "masks" / f"{k}.png")
    for resolution, side in ((None, 40), (20, 20)):
        mask = next(folders.read_masks(folders.scan("masks", tmp_path / "masks"), [0], resolution))
        assert mask.shape == (side, side) and (mask[:, : side // 2] == 255).all() and (mask[:, side // 2 :] == 0).all()


def test_masks_that_do_not_belong_to_the_pictures_are_one_sentence(two: tuple[Path, Path], tmp_path: Path) -> None:
    masks = _masks(tmp_path / "masks")
    with pytest.raises(ConfigError, match="give paired=true with them"):
        _evaluate(two, tmp_path / "out", f"masks={masks}")
    (masks / "03.png").unlink()
    with pytest.raises(ConfigError, match="images=.* has 03 and masks=.* has not"):
        _evaluate(two, tmp_path / "out", f"masks={masks}", "paired=true")
    small = _masks(tmp_path / "small", (20, 40))
    with pytest.raises(ConfigError, match="00.png is 20 x 40, its picture 40 x 40"):
        _evaluate(two, tmp_path / "out", f"masks={small}", "paired=true")


def test_reference_features_are_read_once_and_again_after_a_change(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _evaluate(two, tmp_path / "a", "controls=false")
    looked: list[str] = []
    original = folders.read

    def read(folder: folders.PictureFolder, *rest: object) -> object:
        looked.append(folder.option)
        return original(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(folders, "read", read)
    again = _evaluate(two, tmp_path / "b", "controls=false")
    assert looked.count("reference") == 1  # for the page's pictures
    assert again["methods"] == first["methods"]
    Image.fromarray(_picture(999)).save(two[1] / "00.png")
    looked.clear()
    changed = _evaluate(two, tmp_path / "c", "controls=false")
    assert looked.count("reference") == 2 and changed["methods"] != first["methods"]


def test_other_sizes_are_scaled_and_padded_where_a_resolution_is_given(two: tuple[Path, Path], tmp_path: Path) -> None:
    tall = _folder(tmp_path / "tall", 300, size=(30, 40))
    with pytest.raises(ConfigError, match="tall is 30 x 40, reference=.* is 40 x 40.*resolution=256"):
        _evaluate((tall, two[1]), tmp_path / "out")
    result = _evaluate((tall, two[1]), tmp_path / "out", "resolution=32", "controls=false")
    assert result["protocol"]["pixels"] == "32 x 32 pixels" and "padded to a square" in result["protocol"]["resize"]
    read = list(folders.read(folders.scan("images", tall), [0], 32))
    assert read[0].shape == (32, 32, 3)


def _mixed(a: Path, b: Path) -> None:
    Image.fromarray(_picture(7, (44, 40))).save(a / "03.png")


def _gray(a: Path, b: Path) -> None:
    Image.fromarray(_picture(7)).convert("L").save(a / "03.png")


def _grid(a: Path, b: Path) -> None:
    Image.fromarray(_picture(7, (82, 123))).save(a / "03.png")


def _grid_by_name(a: Path, b: Path) -> None:
    (a / "03.png").rename(a / "sample_grid.png")


def _broken(a: Path, b: Path) -> None:
    (b / "02.png").write_bytes(b"no picture")


def _cut(a: Path, b: Path) -> None:
    (b / "02.png").write_bytes((b / "02.png").read_bytes()[:300])


def _models_and_garments(a: Path, b: Path) -> None:
    for k in range(6):
        (b / f"{k:02d}.png").rename(b / f"{k // 2:06d}_{k % 2}.png")


def _empty(a: Path, b: Path) -> None:
    for file in list(b.iterdir()):
        file.unlink()


def _below(a: Path, b: Path) -> None:
    (b / "test").mkdir()
    for file in b.glob("*.png"):
        file.rename(b / "test" / file.name)


def _one(a: Path, b: Path) -> None:
    for file in sorted(a.iterdir())[1:]:
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (_mixed, (), r"made holds pictures of 2 sizes \(40 x 40, 44 x 40\): give resolution=256"),
        (_gray, (), r"made holds 1 grayscale picture\(s\) \(03.png\), reference=.* none"),
        (_grid, ("resolution=32",), r"03.png is a grid of pictures \(82 x 123 where the others are 40 x 40\)"),
        (_grid_by_name, (), r"sample_grid.png is a grid of pictures \(by its name\)"),
        (_broken, (), r"02.png cannot be read as an image: replace it"),
        (_cut, (), r"02.png .*: replace it"),
        (_models_and_garments, (), r"two photos of each item \(00000\d_0 and 00000\d_1"),
        (_empty, (), r"reference=.*real holds no picture .*: give a folder of pictures"),
        (_below, (), r"pictures are in its subfolders, name one of these"),
        (_one, (), r"made holds 1 picture\(s\), a distance needs at least 2"),
        (lambda a, b: (b / "05.png").rename(b / "7.png"), ("paired=true",), r"made has 05 and reference=.* has not"),
        (lambda a, b: (a / "05.png").unlink(), ("paired=true",), r"real has 05 and images=.* has not"),
        (
            lambda a, b: Image.fromarray(_picture(7)).save(b / "05.bmp"), ("paired=true",),
            r"real has two files called 05",
        ),
        (lambda a, b: None, ("resolution=8",), "resolution=8 is below 16"),
        (lambda a, b: None, (f"lpips={__file__}",), "lpips compares pictures one by one: give paired=true"),
        (lambda a, b: None, ("dists=true",), "dists compares pictures one by one: give paired=true"),
        (lambda a, b: None, ("reference=nowhere",), "reference=nowhere is no folder"),
    ],
)  # fmt: skip
def test_what_would_mean_nothing_is_one_sentence(
    two: tuple[Path, Path], tmp_path: Path, spoil: object, words: tuple[str, ...], message: str
) -> None:
    spoil(*two)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message) as caught:
        _evaluate(two, tmp_path / "out", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_phones_portrait_counts_with_its_upright_size(tmp_path: Path) -> None:
    """Stored lying down, with the turn in EXIF: as upright as the picture beside it, which was stored so."""
    folder = _folder(tmp_path / "mixed", 0, 1, size=(30, 40))
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.fromarray(_picture(1, (40, 30))).save(folder / "01.jpg", exif=turn)
    found = folders.scan("images", folder)
    assert found.sizes == [(30, 40)] * 2 and found.size == (30, 40)
    assert [picture.shape for picture in folders.read(found, [0, 1], None)] == [(40, 30, 3)] * 2


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(folder_run, "observe", measured)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be written"):
        _evaluate(two, tmp_path / "file")


def test_a_reference_that_was_trained_on_is_an_error_whatever_the_file_is_called(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    train = _folder(tmp_path / "train", 200, 4)
    Image.open(two[1] / "04.png").save(train / "renamed.bmp")  # the same pixels in another format
    with pytest.raises(ConfigError, match=r"1 pictures of reference=.* \(04.png is renamed.bmp\)"):
        _evaluate(two, tmp_path / "out", f"train={train}")
    with pytest.raises(ConfigError, match="are one folder"):
        _evaluate((two[0], two[0]), tmp_path / "out")


def test_lossy_files_other_numbers_and_shapes_are_warned_about(tmp_path: Path, two: tuple[Path, Path]) -> None:
    lossy = _folder(tmp_path / "lossy", 0, 5, suffix=".jpg")
    result = _evaluate((lossy, two[1]), tmp_path / "out", "controls=false")
    warnings = " ".join(result["protocol"]["warnings"])
    assert "lossy: lossy files" in warnings and "the other set is lossless" in warnings
    assert "5 against 6 pictures" in warnings
    strips = folders.scan("images", _folder(tmp_path / "strips", 0, size=(80, 40)))
    other = folders.scan("reference", _folder(tmp_path / "other", 9, size=(80, 40)))
    found = " ".join(folders.check_pictures(strips, other, None))
    assert "not square" in found and "grids or pairs" in found
    assert "12 pictures are smaller than 128" in " ".join(folders.check_pictures(strips, other, 128))


def test_many_pictures_take_no_more_memory_than_few(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding runs a bounded number of pictures ahead of measuring."""
    monkeypatch.setattr(folders, "AHEAD", 2)
    folder = folders.scan("images", two[0])
    decoded: list[Path] = []
    original = folders._decode
    monkeypatch.setattr(folders, "_decode", lambda file: decoded.append(file) or original(file))
    pictures = folders.read(folder, range(6), None)
    seen = [next(pictures), next(pictures)]
    assert len(decoded) <= 4
    seen += list(pictures)
    assert all(np.array_equal(p, _picture(k)) for k, p in enumerate(seen)) and len(seen) == 6
    assert torch.from_numpy(np.stack(seen)).shape == (6, 40, 40, 3)
