"""The studio's own small CLIP vocabulary: a byte-level BPE trained on its captions."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from lora_dae.data.studio.attributes import draw_look, stream
from lora_dae.data.studio.captions import caption

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32
VOCABULARY = 1024
# Plain words beyond the studio's own, so that real photos' captions are not spelled letter by letter.
_COMMON = """a product photo of the on with in and flat hanging floor wearing from front back side worn shirt t-shirt
longsleeve polo blouse top undershirt hoodie sweater outwear blazer coat jacket dress skirt pants jeans shorts shoes
body hat socks underwear kids adult men women cotton wool linen silk leather print logo plain textured checked
light dark bright pale navy teal khaki maroon cream studio image picture garment clothing fashion model"""


def corpus() -> list[str]:
    texts = [caption(draw_look(9, i, d), stream(9, i, "caption")) for d in ("base", "target") for i in range(3000)]
    return texts + [_COMMON] * 20


def write_tokenizer(folder: Path) -> int:
    """Write ``vocab.json``, ``merges.txt`` and the configs of a CLIPTokenizer; returns the vocabulary size.

    A vocabulary that is there stays: weights know its numbers, and a new training gives some letters others.
    """
    if (folder / "vocab.json").is_file():
        return len(json.loads((folder / "vocab.json").read_text()))
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for letter in letters:  # every byte may also end a word
        vocab.setdefault(letter + "</w>", len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    special = {k: config[k] for k in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    return len(vocab)
