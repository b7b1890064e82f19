"""Published layouts: trees written as their publishers describe them are read as pairs, end to end."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data.__main__ import data_config, main
from lora_dae.data.export import LAYOUTS, export
from lora_dae.data.sources import load_photos, load_splits, read_entries

PAIRED = ("folder", "fashion_mannequin", "viton_hd", "dress_code", "hf", "shards")
MASKED = (*PAIRED, "deepfashion_multimodal")
SIZES = {"train": 6, "val": 3, "test": 3}


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    sizes = {f"{split}_size": size for split, size in SIZES.items()}
    return DataConfig(resolution=64, cache_dir=str(tmp_path_factory.mktemp("studio")), **sizes)  # type: ignore[arg-type]


def config(name: str, root: Path, cache: Path, **changes: object) -> DataConfig:
    return DataConfig(name=name, root=str(root), resolution=64, cache_dir=str(cache), **changes)  # type: ignore[arg-type]


def photo(path: Path, color: tuple[int, int, int] = (9, 90, 200), size: tuple[int, int] = (48, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_studio_comes_back_from_every_layout(layout: str, studio: DataConfig, tmp_path: Path) -> None:
    for library in {"fashion_gen": ["h5py"], "hf": ["datasets"]}.get(layout, []):
        pytest.importorskip(library)
    made = load_splits(studio)
    assert export(studio, layout, tmp_path / "out") == SIZES
    read = load_splits(config(layout, tmp_path / "out", tmp_path / "cache", test_fraction=0.3, val_fraction=0.2))
    originals = {pair.caption: pair for split in made.values() for pair in (split[i] for i in range(len(split)))}
    pairs = {name: [split[i] for i in range(len(split))] for name, split in read.items()}
    flat = sum(pairs.values(), [])
    assert len(flat) == 12 and {pair.caption for pair in flat} == set(originals)
    if layout in (*PAIRED, "fashion_gen"):  # these publish a test split
        assert {p.caption for p in pairs["test"]} == {made["test"][i].caption for i in range(3)}
    for pair in flat:
        original = originals[pair.caption]
        assert np.abs(pair.image.astype(int) - original.image).mean() < 2  # JPEG at quality 97
        assert (pair.source is not None) == (layout in PAIRED)
        if pair.source is not None:
            assert np.abs(pair.source.astype(int) - original.source).mean() < 2
        assert (pair.mask is not None) == (layout in MASKED)
        if pair.mask is not None:
            np.testing.assert_array_equal(pair.mask, original.mask)


def test_export_overwrites_nothing_and_knows_its_layouts(studio: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(studio, "folder", tmp_path)
    with pytest.raises(ConfigError, match="--layout magazine"):
        export(studio, "magazine", tmp_path / "new")


def test_the_export_command(studio: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"data.{split}_size={size}" for split, size in SIZES.items()]
    overrides += ["data.resolution=64", f"data.cache_dir={studio.cache_dir}"]
    main(["export", "--layout", "fashion_mannequin", "--to", str(tmp_path / "out"), *overrides])
    assert "6 train, 3 val, 3 test" in " ".join(capsys.readouterr().out.split())
    assert len(list((tmp_path / "out" / "mannequin").glob("*.jpg"))) == 12
    with pytest.raises(SystemExit):
        main(["export", "--layout", "folder", "--to", str(tmp_path / "new"), "data=nothing"])
    assert capsys.readouterr().err.startswith("error: these overrides do not fit")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_a_config_and_says_what_it_needs(layout: str, tmp_path: Path) -> None:
    assert data_config([f"data={layout}", "data.root=somewhere"]).name == layout
    with pytest.raises(ConfigError) as caught:
        load_splits(config(layout, tmp_path, tmp_path / "cache"))
    library_is_missing = layout == "hf" and importlib.util.find_spec("datasets") is None
    expected = "lora-dae[hf]" if library_is_missing else str(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="data.root"):
        data_config([f"data={layout}"])


def viton_tree(root: Path) -> None:
    """Two persons; the second column names another garment, as in the published lists."""
    for name in ("00006_00", "00008_00"):
        photo(root / "train" / "image" / f"{name}.jpg")
        photo(root / "train" / "cloth" / f"{name}.jpg")
    (root / "train_pairs.txt").write_text("00006_00.jpg 00008_00.jpg\n00008_00.jpg 00006_00.jpg\n")


def test_viton_hd_ignores_the_second_column(tmp_path: Path) -> None:
    viton_tree(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({"00006": ["red top", "v neck", "cotton"]}))
    tagged = [
        {"tag_name": "item", "tag_category": "shirt"},
        {"tag_name": "sleeveLength", "tag_category": "long sleeve"},
        {"tag_name": "neckLine", "tag_category": None},
    ]
    tags = {"data": [{"file_name": "00008_00.jpg", "tag_info": tagged}]}
    (tmp_path / "train" / "vitonhd_train_tagged.json").write_text(json.dumps(tags))
    first, second = read_entries(config("viton_hd", tmp_path, tmp_path / "cache"))
    assert first.source and first.source.name.endswith("cloth/00006_00.jpg")
    assert first.captions == ("red top, v neck, cotton",)
    assert second.captions == ("model is wearing a long sleeve shirt",)
    assert first.split == "train" and first.group_id == "00006"


def dress_code_tree(root: Path) -> None:
    for category, id in (("dresses", "013563"), ("lower_body", "050000")):
        photo(root / category / "images" / f"{id}_0.jpg")
        photo(root / category / "images" / f"{id}_1.jpg")
        (root / category / "train_pairs.txt").write_text(f"{id}_0.jpg\t{id}_1.jpg\n")
        labels = np.zeros((64, 48), np.uint8)
        labels[10:20], labels[20:30], labels[30:40] = 7, 5, 6
        (root / category / "label_maps").mkdir()
        Image.fromarray(labels).convert("P").save(root / category / "label_maps" / f"{id}_4.png")


def test_dress_code_captions_and_label_maps(tmp_path: Path) -> None:
    dress_code_tree(tmp_path)
    fine = {"013563_1": ["a", "b", "c"], "050000_1": ["only", "two"]}
    (tmp_path / "fine_captions.json").write_text(json.dumps(fine))
    (tmp_path / "coarse_captions.json").write_text(json.dumps({"013563_1": ["long dress", "red"]}))
    (tmp_path / "lower_body" / "dc_caption.txt").write_text("050000_1.jpg a pair of blue jeans\n")
    dress, pants = read_entries(config("dress_code", tmp_path, tmp_path / "cache"))
    assert dress.captions == ("long dress, red",) and pants.captions == ("a pair of blue jeans",)
    assert dress.source and dress.source.name.endswith("dresses/images/013563_1.jpg")
    for entry, rows in ((dress, slice(10, 20)), (pants, slice(20, 40))):
        assert entry.mask
        with Image.open(io.BytesIO(entry.mask.read())) as mask:
            found = np.asarray(mask)[..., 0] > 0
        expected = np.zeros((64, 48), bool)
        expected[rows] = True
        np.testing.assert_array_equal(found, expected)
    one = read_entries(config("dress_code", tmp_path, tmp_path / "cache", category="dresses"))
    assert [entry.id for entry in one] == ["dresses/013563"]


def test_shots_of_one_garment_do_not_leak(tmp_path: Path) -> None:
    names = [f"WOMEN-Dresses-id_{g:08d}-01_{shot}_front.jpg" for g in range(12) for shot in range(1, 5)]
    for name in names:
        photo(tmp_path / "images" / name)
    (tmp_path / "captions.json").write_text(json.dumps(dict.fromkeys(names, "a dress")))
    splits = load_photos(config("deepfashion_multimodal", tmp_path, tmp_path / "cache", test_fraction=0.3))
    groups = [{entry.group_id for entry in split.entries} for split in splits.values()]
    assert sum(map(len, groups)) == 12 and sum(map(len, splits.values())) == 48


def test_product_titles_may_hold_commas(tmp_path: Path) -> None:
    header = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
    rows = [
        "15970,Men,Apparel,Topwear,Shirts,Navy Blue,Fall,2011,Casual,Turtle Check, Men, Navy Shirt",
        "39386,Women,Apparel,Dress,Dresses,NA,Summer,2012,Casual,",
    ]
    (tmp_path / "styles.csv").write_text("\n".join([header, *rows]))
    template = "a photo of a {baseColour} {articleType} for {gender}"
    plain = CaptionConfig(missing="category")
    cfg = config("fashion_product", tmp_path, tmp_path / "cache", captions=plain)
    assert [entry.caption for entry in read_entries(cfg)] == ["Turtle Check, Men, Navy Shirt", "Dresses"]
    cfg.captions = CaptionConfig(template=template)
    told = [entry.caption for entry in read_entries(cfg)]
    assert told == ["a photo of a navy blue shirts for men", "a photo of a dresses for women"]


def test_fashion_gen_texts_in_either_encoding(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for name, count in (("train", 6), ("validation", 2)):
        with h5py.File(tmp_path / f"fashiongen_256_256_{name}.h5", "w") as file:
            file["input_image"] = np.full((count, 16, 16, 3), 50, np.uint8)
            texts = ["robe à fleurs".encode("latin-1"), "robe à fleurs".encode()] * 3
            file["input_description"] = np.array([[text] for text in texts[:count]])
            file["input_productID"] = np.array([[i // 2] for i in range(count)])
    entries = read_entries(config("fashion_gen", tmp_path, tmp_path / "cache"))
    assert {entry.caption for entry in entries} == {"robe à fleurs"}
    assert [entry.split for entry in entries] == ["train"] * 6 + ["test"] * 2
    assert [entry.group_id for entry in entries[:4]] == ["0", "0", "1", "1"]


def test_mannequin_pairs_need_both_photos(tmp_path: Path) -> None:
    for id in "abc":
        photo(tmp_path / "model" / f"{id}.jpg")
        photo(tmp_path / "mannequin" / f"{id}.png")
    lines = [json.dumps({"id": id, "text": "a coat", "group_id": "one", "color": "red"}) for id in "abc"]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    cfg = config("fashion_mannequin", tmp_path, tmp_path / "cache")
    entries = read_entries(cfg)
    assert [(e.id, e.group_id, e.attributes) for e in entries] == [(id, "one", {"color": "red"}) for id in "abc"]
    (tmp_path / "mannequin" / "b.png").unlink()
    with pytest.raises(ConfigError, match="no mannequin/ photo of b"):
        read_entries(cfg)
