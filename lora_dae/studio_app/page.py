"""The page itself, in Gradio: on the left what to draw, on the right strength 0, the chosen one and the real photo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from lora_dae.config import ConfigError
from lora_dae.sampling.sheet import image_grid
from lora_dae.studio_app.preview import MAX_PROMPT, MAX_STEPS, MAX_STRENGTH, Preview, told

KEPT = 24  # drawings in the gallery
# Small pictures fill their frames, below their labels.
_CSS = "#plain img, #chosen img, #real img { width: 100%; height: 100%; object-fit: contain; padding-top: 1.8rem; }"


def build_page(preview: Preview) -> gr.Blocks:
    """The Blocks of one preview; ``serve_page`` serves them."""
    cfg = preview.run.cfg
    sampling, count = cfg.sampling, len(preview.examples)
    sheets = tempfile.TemporaryDirectory(prefix="lora_dae_preview_")  # goes with the process

    with gr.Blocks(title="LoRA-DAE preview", analytics_enabled=False) as page:
        gr.Markdown(f"## LoRA-DAE preview\n`{preview.title}`")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                number = gr.Slider(
                    0, max(0, count - 1), 0, step=1, label="Held-out example", visible=count > 0, elem_id="number",
                )  # fmt: skip
                prompt = gr.Textbox(label="Prompt", lines=3, max_length=MAX_PROMPT, elem_id="prompt")
                source = gr.Image(
                    label="Source photo", visible=preview.has_source, height=220, sources=["upload", "clipboard"],
                    buttons=[], elem_id="source",
                )  # fmt: skip
                strength = gr.Slider(
                    0, MAX_STRENGTH, cfg.enhancement.strength if preview.has_strength else 0, step=0.05,
                    label="Strength" if preview.has_strength else "Strength (no enhancement here)",
                    interactive=preview.has_strength, elem_id="strength",
                )  # fmt: skip
                seed = gr.Number(sampling.seed, precision=0, minimum=0, maximum=2**31, label="Seed", elem_id="seed")
                steps = gr.Slider(1, MAX_STEPS, sampling.num_inference_steps, step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(0, 15, sampling.guidance_scale, step=0.1, label="Guidance: prompt")
                by_source = gr.Slider(
                    0, 15, sampling.source_guidance_scale, step=0.1, label="Guidance: source",
                    visible=preview.has_source,
                )  # fmt: skip
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3):
                with gr.Row():
                    labels = {"plain": "Strength 0", "chosen": "Chosen strength", "real": "Real photo"}
                    plain, chosen, real = (
                        gr.Image(
                            label=label, elem_id=name, interactive=False, format="png", height=340,
                            buttons=["download", "fullscreen"],
                        )
                        for name, label in labels.items()
                    )  # fmt: skip
                download = gr.DownloadButton("Download side by side", interactive=False, elem_id="download")
                gallery = gr.Gallery(
                    label="Drawn so far, newest first", columns=6, format="png", interactive=False, elem_id="gallery",
                    buttons=["download", "fullscreen"], fit_columns=False, object_fit="contain", height=300,
                )  # fmt: skip
        history = gr.State([])

        def take(number: float) -> tuple[str, np.ndarray | None, np.ndarray]:
            pair = preview.example(int(number))
            return pair.caption, pair.source if preview.has_source else None, pair.image

        def draw(
            prompt: str, source: np.ndarray | None, seed: float | None, steps: float, guidance: float, by_source: float,
            strength: float, real: np.ndarray | None, past: list[Any],
        ) -> tuple[np.ndarray, Any, Any, list[Any], list[Any]]:  # fmt: skip
            given = None if seed is None else int(seed)  # None: the field was emptied
            try:
                pictures = preview.draw(prompt, source, given, int(steps), guidance, by_source, strength)
            except ConfigError as error:
                raise gr.Error(str(error)) from error
            assert given is not None  # or draw would have refused it
            label = f"Strength {strength:g}"
            past = [(pictures[1], f"{told(strength, given)}: {prompt}"), *past][:KEPT]
            file = Path(sheets.name) / f"seed{given}_strength{strength:g}.png"
            _sheet([*pictures, real], ["strength 0", label.lower(), "real"], prompt).save(file)
            return (
                pictures[0],
                gr.Image(pictures[1], label=label),
                gr.DownloadButton(value=str(file), interactive=True),
                past,
                past,
            )

        if count > 0:
            chosen_example = [prompt, source, real]
            number.change(take, [number], chosen_example, show_progress="hidden")
            page.load(take, [number], chosen_example, show_progress="hidden")
        inputs = [prompt, source, seed, steps, guidance, by_source, strength, real, history]
        outputs = [plain, chosen, download, gallery, history]
        gr.on([button.click, prompt.submit], draw, inputs, outputs, concurrency_limit=1, concurrency_id="draw")
    return page


def serve_page(page: gr.Blocks, host: str, port: int, wait: bool = True) -> None:
    """Serve ``page``, and nothing beyond it: no link through others' servers, no fonts from elsewhere, no API page.

    Without ``wait`` it returns while the page is served. Raises OSError if the port is taken.
    """
    page.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=not wait, ssr_mode=False,
        footer_links=[], css=_CSS, theme=gr.themes.Soft(font="system-ui", font_mono="monospace"),
    )  # fmt: skip


def _sheet(pictures: list[np.ndarray | None], labels: list[str], caption: str) -> Image.Image:
    known = [(p, label) for p, label in zip(pictures, labels, strict=True) if p is not None]
    size = known[0][0].shape[:2]
    same = [(p, label) for p, label in known if p.shape[:2] == size]
    return image_grid([p for p, _ in same], 1, len(same), [label for _, label in same], [caption], zoom=2)
