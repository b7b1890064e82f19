"""Published layouts: trees written as their publishers describe them are read as pairs, end to end."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import datasets
import fsspec
import h5py
import numpy as np
import pytest
from PIL import Image

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data.__main__ import data_config, main
from lora_dae.data.export import LAYOUTS, export
from lora_dae.data.sources import load_photos, load_splits, read_entries

PAIRED = ("folder", "fashion_mannequin", "viton_hd", "dress_code", "hf", "webdataset", "litdata", "shards")
MASKED = (*PAIRED, "deepfashion_multimodal")
WITHOUT = pytest.mark.skipif(find_spec("litdata") is None, reason="litdata is not installed")
INSTALLED = [pytest.param(name, marks=WITHOUT) if name == "litdata" else name for name in LAYOUTS]
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


@pytest.mark.parametrize("layout", INSTALLED)
def test_the_studio_comes_back_from_every_layout(layout: str, studio: DataConfig, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("layout", INSTALLED)
def test_every_layout_has_a_config_and_says_what_it_needs(layout: str, tmp_path: Path) -> None:
    assert data_config([f"data={layout}", "data.root=somewhere"]).name == layout
    with pytest.raises(ConfigError) as caught:
        load_splits(config(layout, tmp_path, tmp_path / "cache"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="data.root"):
        data_config([f"data={layout}"])


@pytest.mark.parametrize(("layout", "library"), [("hf", "datasets"), ("fashion_gen", "h5py"), ("litdata", "litdata")])
def test_a_library_that_is_not_there_is_said(
    layout: str, library: str, studio: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "x.h5").touch()
    extra = {"hf": "hf", "fashion_gen": "hdf5", "litdata": "litdata"}[layout]
    with pytest.raises(ConfigError, match=rf"lora-dae\[{extra}\]"):
        load_splits(config(layout, tmp_path, tmp_path.parent / "cache"))
    with pytest.raises(ConfigError, match=rf"lora-dae\[{extra}\]"):
        export(studio, layout, tmp_path / "new")


def tar_of(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def encoded(color: tuple[int, int, int], format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 64), color).save(file, format)
    return file.getvalue()


def test_webdataset_tars_of_others(tmp_path: Path) -> None:
    """As img2dataset writes them, and as people do: words in .txt or .json, folders inside, records without photo."""
    more = {"caption": "a hat", "category": "hat", "color": "red", "width": 48, "captions": ["a hat", "headwear"]}
    tar_of(
        tmp_path / "tars" / "train-00.tar",
        {
            "000.jpg": encoded((200, 0, 0), "JPEG"), "000.txt": "ein Kleid, größer".encode(), "000.json": b"{}",
            "001.json": json.dumps(more).encode(), "001.PNG": encoded((0, 200, 0)),
            "002.json": b'{"status": "failed"}',
            "deep/000.webp": encoded((0, 0, 200), "WEBP"), "deep/000.txt": b"a coat",
        },
    )  # fmt: skip
    tar_of(tmp_path / "tars" / "sub" / "val_1.tar", {"0.jpg": encoded((9, 9, 9)), "0.txt": b"a scarf"})
    cfg = config("webdataset", tmp_path / "tars", tmp_path / "cache")
    entries = read_entries(cfg)
    assert [e.id for e in entries] == [
        "val_1.tar/0", "train-00.tar/000", "train-00.tar/001", "train-00.tar/deep/000",
    ]  # fmt: skip
    assert [e.captions for e in entries] == [("a scarf",), ("ein Kleid, größer",), ("a hat", "headwear"), ("a coat",)]
    assert [e.split for e in entries] == ["val", "train", "train", "train"]
    assert (entries[2].category, entries[2].attributes) == ("hat", {"color": "red"})
    splits = load_photos(cfg)
    assert [len(split) for split in splits.values()] == [2, 1, 1] and splits["test"][0].caption == "a scarf"
    assert abs(splits["test"][0].image.astype(int) - 9).max() <= 2
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "tars"), "/elsewhere/tars", recursive=True)
    far = read_entries(replace(cfg, root="memory://elsewhere/tars"))
    assert [(e.id, e.image.read()) for e in far] == [(e.id, e.image.read()) for e in entries]

    whole = (tmp_path / "tars" / "train-00.tar").read_bytes()
    (tmp_path / "tars" / "train-00.tar").write_bytes(whole[:1500])
    with pytest.raises(ConfigError, match="cannot be read as WebDataset tars"):
        read_entries(cfg)
    tar_of(tmp_path / "tars" / "train-00.tar", {"0.json": b"[1]", "0.png": encoded((1, 1, 1))})
    with pytest.raises(ConfigError, match="0.json must be an object"):
        read_entries(cfg)


def test_webdataset_folders_may_name_the_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        tar_of(tmp_path / "tars" / split / "0000.tar", {"0.png": encoded((9, 9, 9)), "0.txt": split.encode()})
    found = read_entries(config("webdataset", tmp_path / "tars", tmp_path / "cache"))
    assert [(entry.split, entry.caption) for entry in found] == [("test", "test"), ("train", "train")]
    assert len({entry.id for entry in found}) == len({entry.group_id for entry in found}) == 2


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


def test_viton_hd_captions_may_be_texts_instead_of_phrases(tmp_path: Path) -> None:
    viton_tree(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({"00006": "red top", "00008": "blue top"}))
    found = read_entries(config("viton_hd", tmp_path, tmp_path / "cache"))
    assert [entry.caption for entry in found] == ["red top", "blue top"]


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
    root = tmp_path / "data"
    names = [f"WOMEN-Dresses-id_{g:08d}-01_{shot}_front.jpg" for g in range(12) for shot in range(1, 5)]
    for k, name in enumerate(names):
        photo(root / "images" / name, (5 * k, 90, 200))  # one file twice would be one garment
    (root / "captions.json").write_text(json.dumps(dict.fromkeys(names, "a dress")))
    splits = load_photos(config("deepfashion_multimodal", root, tmp_path / "cache", test_fraction=0.3))
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


def test_mannequin_files_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    for id in "abcd":
        photo(tmp_path / "model" / f"{id}.jpg")
        photo(tmp_path / "mannequin" / f"{id}.jpg")
    lines = [{"id": id, "text": "a coat"} for id in "abcd"] + [{"id": "a", "text": "a long coat"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    splits = tmp_path / "splits.json"
    cfg = config("fashion_mannequin", tmp_path, tmp_path / "cache")
    splits.write_text(json.dumps({"train": ["a", "b"], "validation": ["c"], "test": ["d"]}))
    entries = read_entries(cfg)
    assert [e.split for e in entries] == ["train", "train", "val", "test"]
    assert entries[0].captions == ("a coat", "a long coat")
    for table, said in (
        ({"train": ["a", "b", "c"], "test": ["d", "a"]}, "names a twice"),
        ({"train": ["a", "b"], "holdout": ["c", "d"]}, "has the split holdout"),
        ({"train": ["a", "b", "c"]}, "does not say where d belongs"),
        (["a"], "must be an object of lists"),
    ):
        splits.write_text(json.dumps(table))
        with pytest.raises(ConfigError, match=said):
            read_entries(cfg)
    splits.unlink()
    photo(tmp_path / "model" / "b.png")
    with pytest.raises(ConfigError, match="have one id, b: rename"):
        read_entries(cfg)


def test_hub_tables_keep_their_splits_and_class_names(tmp_path: Path) -> None:
    kinds = datasets.Features(
        {
            "image": datasets.Image(), "text": datasets.Value("string"),
            "category": datasets.ClassLabel(names=["shirt", "dress"]), "size": datasets.Value("int64"),
        }
    )  # fmt: skip
    for split, count in (("train", 4), ("validation", 2)):
        rows = [
            {"image": Image.new("RGB", (8, 8), (k, 0, 0)), "text": f"{split} {k}", "category": k % 2, "size": k}
            for k in range(count)
        ]
        datasets.Dataset.from_list(rows, features=kinds).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    entries = read_entries(config("hf", tmp_path, tmp_path / "cache"))
    assert [(e.split, e.caption, e.category) for e in entries][3:] == [
        ("train", "train 3", "dress"), ("val", "validation 0", "shirt"), ("val", "validation 1", "dress"),
    ]  # fmt: skip
    assert entries[1].attributes == {"category": "dress"}
    splits = load_photos(config("hf", tmp_path, tmp_path.parent / "cache"))
    assert {entry.split for entry in splits["test"].entries} == {"val"} and len(splits["test"]) == 2


def test_hub_folders_may_name_the_splits_and_other_splits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        rows = [{"image": Image.new("RGB", (8, 8)), "text": split}]
        datasets.Dataset.from_list(rows, features=kinds).to_parquet(tmp_path / "data" / split / "0000.parquet")
    found = read_entries(config("hf", tmp_path / "data", tmp_path / "cache"))
    assert sorted((entry.split, entry.caption) for entry in found) == [("test", "test"), ("train", "train")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"holdout": None})
    with pytest.raises(ConfigError, match="has a split holdout") as caught:
        read_entries(DataConfig(name="hf", root="owner/name"))
    assert "\n" not in str(caught.value)


def test_hub_ids_may_name_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **options: object) -> object:
        asked.append((args, options))
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for root in ("owner/name@abc", "owner/name"):
        with pytest.raises(ConfigError, match=f"data.root={root} cannot be loaded as a data set .offline.") as caught:
            read_entries(DataConfig(name="hf", root=root))
        assert "\n" not in str(caught.value)
    assert asked == [(("owner/name",), {"revision": "abc"}), (("owner/name",), {"revision": None})]
