"""The report says how to draw with the files that the run has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_dae.adapter.words import FILE_NAME as WORDS_FILE
from lora_dae.adapter.words import TOKEN
from lora_dae.config import AdapterConfig, BackboneConfig, Config
from lora_dae.evaluation import run


def test_the_page_says_how_to_draw_with_the_files_that_the_run_has() -> None:
    def usage(**adapter: Any) -> str:
        return run.usage(Config(run_dir="x", conditioning="none", adapter=AdapterConfig(**adapter)), "sd1")

    words = usage(kind="textual_inversion")
    assert f'pipe.load_textual_inversion("adapter/{WORDS_FILE}", token="{TOKEN}")' in words
    assert f'pipe("{TOKEN} a woman' in words and "attach" not in words
    assert 'lora_dae.attach(pipe, "adapter"' in usage() and TOKEN not in usage()
    assert "sample.py" in usage(kind="lokr") and "attach" not in usage(kind="loha")
    assert 'StableDiffusionPipeline.from_pretrained(lora_dae.__path__[0] + "/backbone/studio/weights")' in usage()
    for backbone, loads in (
        (
            BackboneConfig("sdxl"),
            'StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0"',
        ),
        (BackboneConfig("file", path="/m/any.safetensors"), 'Pipeline.from_single_file("/m/any.safetensors")'),
        (BackboneConfig("folder", path="/m/sd", prediction_type="v_prediction"), "prediction_type='v_prediction'"),
    ):
        assert loads in run.usage(Config(run_dir="x", backbone=backbone), "sdxl")


def test_the_page_draws_as_the_report_was_drawn() -> None:
    """With the source photo, where the enhancement was trained, and with the captions' first word."""
    cfg = Config(run_dir="x")
    words = run.usage(cfg, "sd1")
    compile(words, "usage", "exec")
    assert "from PIL import Image" in words and ', source=Image.open("mannequin.jpg")).images[0]' in words
    assert "placement" not in words
    cfg.conditioning, cfg.enhancement.placement, cfg.data.captions.trigger = "none", "direction", "sks"
    words = run.usage(cfg, "sd1")
    compile(words, "usage", "exec")
    assert "Image" not in words and 'placement="direction")' in words and 'pipe("sks a woman' in words
    assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)" in words  # the hub's SD 1.5 has PNDM
    cfg.adapter.full_finetune = True
    assert 'from_pretrained("adapter/unet")' in run.usage(cfg, "sd1")
    cfg.conditioning = "source"  # the source's channels are in that UNet, for which no text-to-image pipeline is made
    for adapter in (cfg.adapter, AdapterConfig(kind="textual_inversion")):
        words = run.usage(replace(cfg, adapter=adapter), "sd1")
        assert words.startswith("python sample.py run=") and "source=mannequin.jpg" in words and TOKEN not in words


def test_the_page_says_where_one_scale_guides_caption_and_source() -> None:
    """Pictures of the report had two, which a pipeline's call has no place for."""
    cfg = Config(run_dir="x")
    assert "one scale" not in run.usage(cfg, "sd1")
    cfg.sampling.guidance_scale, cfg.sampling.source_guidance_scale = 3.0, 1.5
    words = run.usage(cfg, "sd1")
    compile(words, "usage", "exec")
    assert "# attach guides caption and source by one scale; the report has 3 and 1.5, as sample.py draws" in words
    cfg.conditioning = "none"
    assert "one scale" not in run.usage(cfg, "sd1")
