"""One studio photo: background, light, figure, garment; averaged down from twice the size."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from lora_dae.data.studio import draw, figure
from lora_dae.data.studio.attributes import BACKGROUNDS, Garment, Look, stream
from lora_dae.data.studio.draw import Array
from lora_dae.data.studio.garment import Tailor
from lora_dae.data.studio.pose import Arm, Body, Pose, draw_pose, source_pose

Light = tuple[float, float]


@dataclass(frozen=True)
class Photo:
    """image: uint8 (n, n, 3) RGB; mask: uint8 (n, n), 255 on the garment."""

    image: Array
    mask: Array


def _backdrop(n: int, color: str, rng: np.random.Generator, flat: bool) -> Array:
    """A seamless paper roll, lit from above, or a table top."""
    base = np.array(BACKGROUNDS[color], np.float32) / 255
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n
    cx, cy = rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.5)
    fall = 1.03 - 0.16 * ((x - cx) ** 2 + (y - cy) ** 2)
    if not flat:
        fall = fall - 0.06 / (1 + np.exp(-(y - rng.uniform(0.80, 0.9)) * 30))
    return np.clip(base * fall[..., None], 0, 1).astype(np.float32)


def _exposure(rng: np.random.Generator) -> float:
    """Drawn first, so that a model and a mannequin from one stream share it."""
    return float(rng.uniform(0.96, 1.04))


def _light(rng: np.random.Generator) -> Light:
    angle = rng.uniform(-2.5, -0.65)  # from above, left to right
    return float(np.cos(angle)), float(np.sin(angle))


def _finish(canvas: Array, mask: Array, resolution: int, exposure: float) -> Photo:
    image = cv2.resize(np.clip(canvas * exposure, 0, 1), (resolution, resolution), interpolation=cv2.INTER_AREA)
    small = cv2.resize(mask, (resolution, resolution), interpolation=cv2.INTER_AREA)
    return Photo(np.round(image * 255).astype(np.uint8), (small > 0.5).astype(np.uint8) * 255)


def _cast_shadow(canvas: Array, body: Body, light: Light) -> None:
    x, y = body.grid()
    c = float(body.center(2.5))
    blob = np.exp(-(((x - c + 0.5 * light[0]) / 1.0) ** 2)) * np.clip((y - 0.6) / 2.0, 0, 1)
    draw.darken(canvas, blob.astype(np.float32), 0.07)


def model_photo(look: Look, pose: Pose, drape: np.random.Generator, rng: np.random.Generator, resolution: int) -> Photo:
    """A person wearing the garment. ``drape`` draws the folds, ``rng`` light and backdrop."""
    n = 2 * resolution
    body = Body.for_garment(look.garment, pose, look.person.gender, n)
    exposure = _exposure(rng)
    canvas, light = _backdrop(n, look.background, rng, False), _light(rng)
    _cast_shadow(canvas, body, light)
    head = figure.Head(body, look.person, light)
    skin = figure.skin_of(look.person)
    head.draw_back(canvas)
    figure.draw_under(canvas, body, look.garment, look.person.seed, skin, light)
    mask = _dress(canvas, body, look.garment, drape, light, look.person.seed, skin)
    before = canvas.copy()
    head.draw_front(canvas)
    hidden = draw.changed(before, canvas, 0.02)
    return _finish(canvas, mask * (1 - hidden), resolution, exposure)


def mannequin_photo(
    garment: Garment, build: str, background: str, pose: Pose, drape: np.random.Generator,
    rng: np.random.Generator, resolution: int,
) -> Photo:  # fmt: skip
    """The garment on a headless mannequin."""
    n = 2 * resolution
    body = Body.for_garment(garment, pose, build, n)
    exposure = _exposure(rng)
    canvas, light = _backdrop(n, background, rng, False), _light(rng)
    _cast_shadow(canvas, body, light)
    color = figure.mannequin_color(int(rng.integers(2**31)))
    figure.draw_stand(canvas, body)
    figure.draw_trunk(canvas, body, color, light)
    mask = _dress(canvas, body, garment, drape, light, None, color)
    figure.draw_neck_cap(canvas, body, color)
    return _finish(canvas, mask, resolution, exposure)


def _dress(canvas, body: Body, garment: Garment, drape, light: Light, top_seed: int | None, skin) -> Array:
    """Put the garment on, arms over the trunk, sleeves over the arms; returns the visible mask."""
    tailor = Tailor(garment, body, drape, light)
    if garment.kind == "skirt" and top_seed is not None:
        figure.draw_plain_top(canvas, body, garment, top_seed, light)
    tailor.draw_trunk(canvas)
    before = canvas.copy()
    figure.draw_arms(canvas, body, skin, light)
    bare = draw.changed(before, canvas, 0.08)
    tailor.mask = tailor.mask * (1 - bare)
    tailor.draw_sleeves(canvas)
    return tailor.mask


def flat_photo(garment: Garment, background: str, rng: np.random.Generator, drape, resolution: int) -> Photo:
    """The garment spread out on a table, seen from above, a little turned."""
    n = 2 * resolution
    out = float(rng.uniform(0.45, 0.75)) if garment.sleeve == "long" else float(rng.uniform(0.7, 1.0))
    pose = Pose(0.0, 0.0, 0.0, (Arm(out, -0.12), Arm(out, -0.12)), 0.3)
    body = Body.for_garment(garment, pose, "woman", n)
    hem = {"mini": 4.8, "knee": 5.6, "midi": 6.35}.get(garment.length, 4.0)
    top, bottom = {"skirt": 2.6, "dress": 1.1}.get(garment.kind, 0.95), hem
    wide = 3.6 if garment.sleeve == "long" else (2.6 if garment.kind != "skirt" else 2.2)
    scale = float(rng.uniform(0.80, 0.90)) * n / max(bottom - top, wide)
    body = Body(n, pose, "woman", scale, n * 0.5, n * 0.5 - scale * (top + bottom) / 2)
    exposure = _exposure(rng)
    canvas, light = _backdrop(n, background, rng, True), _light(rng)
    layer = canvas.copy()
    tailor = Tailor(garment, body, drape, light)
    tailor.draw_trunk(layer)
    tailor.draw_sleeves(layer)
    inside = draw.fill(n, body.px(np.array([(-0.26, 1.14), (0.26, 1.14), (0.24, 1.5), (-0.24, 1.5)])))
    if garment.kind not in ("skirt",):
        cloth = tailor.cloth[:-1, :-1].reshape(-1, 3).mean(0) * 0.45
        draw.over(layer, cloth, inside * (1 - tailor.mask) * draw.blur(tailor.mask, 0.12 * scale))
        whole = np.maximum(tailor.mask, (inside * draw.blur(tailor.mask, 0.12 * scale) > 0.2).astype(np.float32))
    else:
        whole = tailor.mask
    shadow = draw.blur(np.roll(whole, (round(0.06 * scale), round(-0.05 * scale * light[0])), (0, 1)), 0.07 * scale)
    draw.darken(canvas, shadow, 0.35)
    draw.over(canvas, layer, whole)
    turn = float(rng.uniform(-9, 9))
    matrix = cv2.getRotationMatrix2D((n / 2, n / 2), turn, 1.0)
    canvas = cv2.warpAffine(canvas, matrix, (n, n), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    mask = cv2.warpAffine(tailor.mask, matrix, (n, n), flags=cv2.INTER_LINEAR)
    return _finish(canvas, mask, resolution, exposure)


def photo(look: Look, seed: int, index: int, resolution: int) -> Photo:
    """The target photo of item ``index``."""
    drape, rng = stream(seed, index, "drape"), stream(seed, index, "photo")
    if look.view == "flat":
        return flat_photo(look.garment, look.background, rng, drape, resolution)
    pose = draw_pose(stream(seed, index, "pose"))
    if look.view == "mannequin":
        return mannequin_photo(look.garment, look.person.gender, look.background, pose, drape, rng, resolution)
    return model_photo(look, pose, drape, rng, resolution)


def source_photo(look: Look, seed: int, index: int, resolution: int, difficulty: str) -> Photo:
    """The same garment, texture for texture, on a mannequin (see ``pose.source_pose``)."""
    pose = source_pose(draw_pose(stream(seed, index, "pose")), stream(seed, index, "srcpose"), difficulty)
    same_cloth = difficulty != "reposed"
    drape = stream(seed, index, "drape" if same_cloth else "srcdrape")
    rng = stream(seed, index, "photo" if difficulty == "aligned" else "srcphoto")
    background = "white" if stream(seed, index, "srcback").uniform() < 0.7 else "gray"
    return mannequin_photo(look.garment, look.person.gender, background, pose, drape, rng, resolution)
