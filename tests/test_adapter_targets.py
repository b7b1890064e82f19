"""Groups by meaning, on the three UNet families."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from adapter_models import FAMILIES, tiny_unet
from torch import nn

from lora_dae.adapter.inject import inject
from lora_dae.adapter.targets import is_spatial_conv, largest_rank, select
from lora_dae.config import UNET_GROUPS, AdapterConfig, ConfigError

PATTERNS = {
    "cross_attention": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
    "self_attention": r".*\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    "feed_forward": r".*\.ff\.net\.(0\.proj|2)",
    "conv": r".*(\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|samplers\.0\.conv)",
    "conv_in": r"conv_in",
    "conv_out": r"conv_out",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", UNET_GROUPS)
def test_group_is_every_layer_of_that_name(family: str, group: str) -> None:
    unet = tiny_unet(family)
    expected = [
        name
        for name, module in unet.named_modules()
        if re.fullmatch(PATTERNS[group], name) and isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    assert expected
    assert select(unet, [group]) == dict.fromkeys(expected, group)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_disjoint_and_leave_only_embeddings_and_projections(family: str) -> None:
    unet = tiny_unet(family)
    chosen = select(unet, UNET_GROUPS)
    assert Counter(chosen.values()) == sum(
        (Counter(select(unet, [group]).values()) for group in UNET_GROUPS), Counter()
    )
    rest = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in chosen
    ]
    assert all(re.search(r"proj_in|proj_out|time_embedding|add_embedding", name) for name in rest)


def test_conv_is_kohyas_definition() -> None:
    """sd-scripts networks/lora.py: all conv and linear children of these three classes, by class name."""
    unet = tiny_unet()
    expected = set()
    for name, module in unet.named_modules():
        if module.__class__.__name__ in ("ResnetBlock2D", "Downsample2D", "Upsample2D"):
            for child_name, child in module.named_modules():
                if child.__class__.__name__ in ("Linear", "Conv2d"):
                    expected.add(f"{name}.{child_name}")
    assert set(select(unet, ["conv"])) == expected
    assert {name.rpartition(".")[2] for name in expected if not is_spatial_conv(unet.get_submodule(name))} == {
        "conv_shortcut",
        "time_emb_proj",
    }


def test_selection_is_the_same_on_an_injected_unet() -> None:
    unet = tiny_unet()
    before = select(unet, UNET_GROUPS)
    inject(unet, AdapterConfig(targets=list(UNET_GROUPS), rank=2))
    assert select(unet, UNET_GROUPS) == before


def test_largest_rank_is_the_rank_of_the_weight_matrix() -> None:
    assert largest_rank(nn.Linear(3, 7)) == 3
    assert largest_rank(nn.Conv2d(1, 16, 3)) == 9
    assert largest_rank(nn.Conv2d(64, 4, 3)) == 4


def test_unknown_group_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="'attention'.*cross_attention, self_attention"):
        select(tiny_unet(), ["attention"])


def test_no_group_is_an_error() -> None:
    with pytest.raises(ConfigError, match="empty"):
        select(tiny_unet(), [])


def test_group_without_layers_is_an_error() -> None:
    unet = tiny_unet()
    unet.conv_out = nn.Identity()
    del unet._modules["conv_out"]
    with pytest.raises(ConfigError, match="'conv_out'.*no such layer"):
        select(unet, ["conv_out"])
