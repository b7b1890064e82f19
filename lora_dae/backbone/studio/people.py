"""Where heads and hands are in BASE photos, so that the denoiser's loss can count them for more.

A face is 5 x 6 latents of 1,024: 3 % of a model's photo and 1 % of an evenly weighted loss, yet the first
thing that a person looks at.

In the first third of the training every other step sees them close: 64 crops of 16 x 16 latents, whose captions begin
with "close up of" and are never dropped (Patch Diffusion, 2304.12526, tells the network a crop's coordinates; here a
word does). In 24 minutes of it the loss on held-out heads fell from .184 to .160. Told or not, crops put two heads into
some whole photos, so the rest of the training shows whole photos alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_dae.data.studio.attributes import draw_look, stream
from lora_dae.data.studio.dataset import StudioDataset
from lora_dae.data.studio.pose import Body, draw_pose

HEAD_WEIGHT, HAND_WEIGHT = 8.0, 4.0
CLOSE_SHARE = 1 / 3  # of the training's time
CROPS, CROP_SIZE, HEAD_SHARE = 64, 16, 0.75  # a step's crops, their latents, how many show the head
_HEAD, _HAND = (0.52, 0.62), (0.30, 0.30)  # half axes, head heights


def weights_of(data: StudioDataset, latent_size: int) -> tuple[np.ndarray, np.ndarray]:
    """How much each place of each photo counts, and which photos show a model.

    Returns:
        float16 (N, latent_size, latent_size), 1 away from heads and hands, and the indices of the model photos.
    """
    out = np.ones((len(data), latent_size, latent_size), np.float16)
    models = []
    for i in range(len(data)):
        look = draw_look(data.seed, data.start + i, data.domain)
        if look.view != "model":
            continue
        models.append(i)
        pose = draw_pose(stream(data.seed, data.start + i, "pose"))
        body = Body.for_garment(look.garment, pose, look.person.gender, latent_size)
        head = np.array((1.15 * np.sin(pose.tilt) * 0.6, 0.46), np.float32)
        spots = [(head, _HEAD, HEAD_WEIGHT)]
        for side in (-1, 1):
            _, elbow, wrist = body.arm(side)
            way = (wrist - elbow) / np.hypot(*(wrist - elbow))
            spots.append((wrist + 0.2 * way, _HAND, HAND_WEIGHT))
        x, y = body.grid()
        for (cx, cy), (rx, ry), weight in spots:
            inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
            out[i][inside] = np.maximum(out[i][inside], weight)
    return out, np.array(models)


def close(
    rng: np.random.Generator, latents: np.ndarray, places: np.ndarray, tokens: Tensor, models: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of crops around heads and hands.

    Args:
        latents: (N, C, S, S).
        places: from ``weights_of``, (N, S, S).
        tokens: ids of captions that say it, several for each photo, (N, V, L).
        models: the photos that show a model.

    Returns:
        Latents (CROPS, C, CROP_SIZE, CROP_SIZE) and their places' weights, float32, and token ids (CROPS, L).
    """
    side, half = latents.shape[-1], CROP_SIZE // 2
    rows = rng.choice(models, CROPS)
    z, weight = [], []
    for row in rows:
        wanted = HEAD_WEIGHT if rng.uniform() < HEAD_SHARE else HAND_WEIGHT
        spots = np.argwhere(places[row] == wanted)
        if not len(spots):  # hands outside of the picture
            spots = np.argwhere(places[row] == HEAD_WEIGHT)
        middle = spots[rng.integers(len(spots))] + rng.integers(-half // 2, half // 2 + 1, size=2)
        top, left = np.clip(middle - half, 0, side - CROP_SIZE)
        window = (slice(top, top + CROP_SIZE), slice(left, left + CROP_SIZE))
        z.append(latents[row][:, *window])
        weight.append(places[row][window])
    ids = tokens[torch.from_numpy(rows), torch.from_numpy(rng.integers(tokens.shape[1], size=CROPS))]
    stacked = [torch.from_numpy(np.stack(part).astype(np.float32)) for part in (z, weight)]
    return stacked[0], stacked[1], ids
