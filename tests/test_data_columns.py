"""Columns: what a table says arrives whole, an empty cell is none, and an export keeps what it read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from test_data_splits import config, png, save, write_parquet, write_rows, write_tar

from lora_dae.config import CaptionConfig, ConfigError
from lora_dae.data.export import export
from lora_dae.data.formats import writing
from lora_dae.data.sources import load_photos, read_entries

NAN = float("nan")  # json.dumps writes it as pandas does: NaN


def test_a_comma_without_quotes_is_refused_and_named(tmp_path: Path) -> None:
    """The text would be cut there, and its rest be taken for the category."""
    table = tmp_path / "data" / "metadata.csv"
    save(tmp_path / "data" / "a.png", 0)
    table.write_text("file_name,text,category\na.png,a red hat, blue band,hat\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv line 2 has more columns than .*commas in double quotes"):
        read_entries(config("folder", tmp_path / "data"))
    table.write_text('file_name,text,category\na.png,"a red hat, blue band",hat,\n')  # nothing is lost at the end
    (entry,) = read_entries(config("folder", tmp_path / "data"))
    assert (entry.caption, entry.category, entry.attributes) == ("a red hat, blue band", "hat", {})


def test_nan_in_json_is_an_empty_cell(tmp_path: Path) -> None:
    empty = {"group_id": NAN, "category": NAN, "color": NAN}
    save(tmp_path / "folder" / "a.png", 0)
    row = {"file_name": "a.png", "text": "a hat", "captions": [NAN, "headwear"], "source": NAN, **empty}
    write_rows(tmp_path / "folder" / "metadata.jsonl", [row])
    (entry,) = read_entries(config("folder", tmp_path / "folder"))
    assert (entry.captions, entry.group_id, entry.source) == (("a hat", "headwear"), "a.png", None)
    assert (entry.category, entry.attributes) == (None, {})
    write_rows(tmp_path / "folder" / "metadata.jsonl", [{**row, "text": NAN, "captions": []}])
    with pytest.raises(ConfigError, match="line 1 has no text"):
        read_entries(config("folder", tmp_path / "folder"))

    for part in ("model", "mannequin"):
        save(tmp_path / "pairs" / part / "a.png", 0)
    write_rows(tmp_path / "pairs" / "captions.jsonl", [{"id": "a", "text": "a hat", **empty}, {"id": "a", "text": NAN}])
    (entry,) = read_entries(config("fashion_mannequin", tmp_path / "pairs"))
    assert (entry.captions, entry.group_id, entry.category, entry.attributes) == (("a hat",), "a", None, {})
    write_rows(tmp_path / "pairs" / "captions.jsonl", [{"id": NAN, "text": "a hat"}])
    with pytest.raises(ConfigError, match="line 1 has no id"):
        read_entries(config("fashion_mannequin", tmp_path / "pairs"))


def test_groups_of_tars_and_tables_may_have_gaps_and_begin_at_zero(tmp_path: Path) -> None:
    """A gap is a garment of its own; the number 0 is a group like others."""
    groups = [0, 0, NAN, NAN, 1]
    rows = [json.dumps({"text": f"hat {k}", "group_id": group}).encode() for k, group in enumerate(groups)]
    files = {name: data for k in range(5) for name, data in ((f"{k}.png", png(k)), (f"{k}.json", rows[k]))}
    write_tar(tmp_path / "tars" / "photos.tar", files)
    found = [entry.group_id for entry in read_entries(config("webdataset", tmp_path / "tars"))]
    assert found == ["0", "0", "photos.tar/2", "photos.tar/3", "1"]
    table = [{"image": png(k), "text": f"hat {k}", "group_id": float(group)} for k, group in enumerate(groups)]
    write_parquet(tmp_path / "table" / "photos.parquet", table, group_id=datasets.Value("float64"))
    found = [entry.group_id for entry in read_entries(config("hf", tmp_path / "table"))]
    assert found == ["0.0", "0.0", "train/2", "train/3", "1.0"]


def test_empty_cells_of_a_hub_table_are_photos_without_a_source(tmp_path: Path) -> None:
    sources = [png(100 + k) if k % 2 else None for k in range(8)]
    rows = [{"image": png(k), "text": f"hat {k}", "source": source} for k, source in enumerate(sources)]
    write_parquet(tmp_path / "table" / "photos.parquet", rows, source=datasets.Image())
    cfg = config("hf", tmp_path / "table")
    assert [entry.source and entry.source.read() for entry in read_entries(cfg)] == sources
    everyone, paired = load_photos(cfg), load_photos(replace(cfg, missing_source="drop"))
    assert sum(map(len, everyone.values())) == 8 and not everyone["train"].has_source
    assert sum(map(len, paired.values())) == 4 and paired["train"].has_source

    masked = [{**row, "mask": row["source"]} for row in rows]
    write_parquet(tmp_path / "masked" / "photos.parquet", masked, source=datasets.Image(), mask=datasets.Image())
    with pytest.raises(ConfigError, match="row 0 has no mask but other lines do"):
        read_entries(config("hf", tmp_path / "masked"))


@pytest.mark.parametrize(
    ("layout", "lost"),
    [("folder", ["file_name", "source", "split"]), ("fashion_mannequin", []), ("hf", ["source"]), ("webdataset", [])],
)
def test_what_a_table_says_goes_through_an_export(
    layout: str, lost: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All captions, what is not to be mirrored, groups; attributes with a layout's own names change none of these."""
    words = {"source": "web", "split": "summer", "file_name": "x.jpg", "color": "red"}
    rows = [
        {
            "image": png(k), "conditioning_image": png(100 + k), "text": f"hat {k}", "captions": [f"headwear {k}"],
            "mirror": k % 2 == 0, "group_id": f"g{k}", **words,
        }
        for k in range(8)
    ]  # fmt: skip
    kinds = {name: datasets.Value("string") for name in ("group_id", *words)}
    kinds |= {"captions": datasets.List(datasets.Value("string")), "mirror": datasets.Value("bool")}
    write_parquet(tmp_path / "table" / "photos.parquet", rows, conditioning_image=datasets.Image(), **kinds)
    cfg = config("hf", tmp_path / "table")
    writing.say_once.cache_clear()
    export(cfg, layout, tmp_path / "out")
    told = capsys.readouterr().err
    found = {entry.caption: entry for entry in read_entries(config(layout, tmp_path / "out"))}
    assert len(found) == 8
    for name, pairs in load_photos(cfg).items():
        for entry in pairs.entries:
            number = int(entry.caption.split()[1])
            again = found[entry.caption]
            assert again.captions == (f"hat {number}", f"headwear {number}") and again.mirror == (number % 2 == 0)
            assert (again.split, again.group_id, again.source is None) == (name, f"g{number}", False)
            assert again.attributes == {key: word for key, word in words.items() if key not in lost}
    said = f"not written, because the layout has columns of these names: {', '.join(lost)}"
    assert (said in told) if lost else ("not written" not in told)


def test_an_empty_caption_file_is_a_missing_caption(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for k, name in enumerate("abc"):
        save(root / f"{name}.png", k)
        (root / f"{name}.txt").write_text("\n" if name == "b" else "a hat")
    captions = {
        missing: [e.caption for e in read_entries(config("folder", root, captions=CaptionConfig(missing=missing)))]
        for missing in ("drop", "file_name")
    }
    assert captions == {"drop": ["a hat", "a hat"], "file_name": ["a hat", "b", "a hat"]}
    with pytest.raises(ConfigError, match="b.txt is empty"):
        read_entries(config("folder", root))
