"""Where a body is: camera, proportions, joints.

Lengths are in head heights (hu): a figure is about 7.6 hu tall, 0 is the top of the head, x = 0 the
middle. ``Frame`` turns them into pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lora_dae.data.studio.attributes import Garment
from lora_dae.data.studio.draw import Array, smooth_interp

SHOULDER_Y, CHEST_Y, WAIST_Y, HIP_Y, CROTCH_Y, KNEE_Y = 1.46, 2.05, 2.78, 3.45, 3.80, 5.55
# (y, half width) of the trunk below the shoulders
_TRUNK = {
    "woman": [(1.46, 0.70), (1.75, 0.60), (2.05, 0.585), (2.78, 0.455), (3.45, 0.665), (3.9, 0.66)],
    "man": [(1.46, 0.88), (1.75, 0.76), (2.05, 0.715), (2.78, 0.60), (3.45, 0.635), (3.9, 0.62)],
}
SHOULDER = {"woman": 0.72, "man": 0.90}
ARM_RADII = {"woman": (0.17, 0.135, 0.09), "man": (0.215, 0.17, 0.115)}
_UPPER, _LOWER = 1.32, 1.18  # arm lengths


@dataclass(frozen=True)
class Arm:
    """Angles in radians: ``upper`` outward from hanging straight down, ``lower`` further outward."""

    upper: float
    lower: float


@dataclass(frozen=True)
class Pose:
    lean: float  # sideways shift of the hips, hu
    tilt: float  # of the head, radians
    turn: float  # of the face and trunk to one side, -1..1
    arms: tuple[Arm, Arm]  # image left, image right
    stance: float  # half distance of the feet, hu
    dx: float = 0.0  # place in the picture, in picture widths
    dy: float = 0.0
    zoom: float = 1.0


def draw_pose(rng: np.random.Generator) -> Pose:
    """A relaxed standing pose."""

    def arm() -> Arm:
        kind = rng.uniform()
        if kind < 0.62:  # hanging
            return Arm(float(rng.uniform(0.10, 0.26)), float(rng.uniform(-0.18, -0.02)))
        if kind < 0.82:  # hand on the hip
            return Arm(float(rng.uniform(0.52, 0.66)), float(rng.uniform(-1.42, -1.22)))
        return Arm(float(rng.uniform(0.28, 0.42)), float(rng.uniform(-0.35, -0.1)))  # held away

    return Pose(
        lean=float(rng.uniform(-0.11, 0.11)),
        tilt=float(rng.uniform(-0.10, 0.10)),
        turn=float(rng.uniform(-0.7, 0.7)),
        arms=(arm(), arm()),
        stance=float(rng.uniform(0.22, 0.42)),
        dx=float(rng.uniform(-0.03, 0.03)),
        dy=float(rng.uniform(-0.012, 0.012)),
        zoom=float(rng.uniform(0.96, 1.04)),
    )


def source_pose(target: Pose, rng: np.random.Generator, difficulty: str) -> Pose:
    """The mannequin's pose for a target pose: aligned, shifted (place, scale) or reposed."""
    if difficulty == "aligned":
        return target
    moved = replace(
        target,
        dx=float(rng.uniform(-0.07, 0.07)),
        dy=float(rng.uniform(-0.03, 0.03)),
        zoom=float(rng.uniform(0.84, 1.12)),
    )
    if difficulty == "shifted":
        return moved
    other = draw_pose(rng)
    return replace(other, dx=moved.dx, dy=moved.dy, zoom=moved.zoom)


@dataclass(frozen=True)
class Body:
    """A posed body in a frame of n x n pixels."""

    n: int
    pose: Pose
    build: str  # woman | man
    scale: float  # pixels per hu
    ox: float
    oy: float

    @classmethod
    def for_garment(cls, garment: Garment, pose: Pose, build: str, n: int) -> Body:
        """Frame the figure so that the garment fills the picture, the way a catalog does."""
        visible = {"dress": 6.1, "skirt": 5.9}.get(garment.kind, 4.7)
        if garment.kind in ("dress", "skirt"):
            visible = {"mini": 5.3, "knee": 5.9, "midi": 6.5}[garment.length]
        scale = 0.955 * n / visible * pose.zoom
        return cls(n, pose, build, scale, n * (0.5 + pose.dx), n * (0.055 + pose.dy + 0.4 * (1 - pose.zoom)))

    def px(self, points: ArrayLike) -> Array:
        """hu -> pixels, (..., 2)."""
        return np.asarray(points, np.float32) * self.scale + np.array((self.ox, self.oy), np.float32)

    def grid(self) -> tuple[Array, Array]:
        """x (1, n) and y (n, 1) in hu of the pixel centers, float32; they broadcast to (n, n)."""
        t = np.arange(self.n, dtype=np.float32) + 0.5
        x, y = (t - self.ox) / self.scale, (t - self.oy) / self.scale
        return x[None, :], y[:, None]

    def center(self, y: Array | float) -> Array:
        """x of the middle of the trunk at height y: an S-curve from the neck to the hips."""
        lean = self.pose.lean
        return smooth_interp(y, [(0.9, 0.0), (1.46, 0.02 * lean), (2.6, 0.45 * lean), (3.5, lean), (6.5, 0.55 * lean)])

    def half_width(self, y: Array | float) -> Array:
        return smooth_interp(y, _TRUNK[self.build])

    def shoulder(self, side: int) -> Array:
        """Joint of the arm; side -1 is image left. The shoulders tip against the hips."""
        drop = -0.35 * self.pose.lean * side
        return np.array((side * (SHOULDER[self.build] - 0.13), SHOULDER_Y + 0.13 + drop), np.float32)

    def arm(self, side: int) -> tuple[Array, Array, Array]:
        """Shoulder, elbow and wrist of one arm, hu."""
        arm = self.pose.arms[0 if side < 0 else 1]
        a = self.shoulder(side)
        length = 1.0 if self.build == "woman" else 1.05
        b = a + _UPPER * length * np.array((side * np.sin(arm.upper), np.cos(arm.upper)), np.float32)
        angle = arm.upper + arm.lower
        c = b + _LOWER * length * np.array((side * np.sin(angle), np.cos(angle)), np.float32)
        return a, b, c

    def leg(self, side: int) -> list[tuple[float, float, float]]:
        """(y, x of the middle, half width) along one leg, hu."""
        c = float(self.center(HIP_Y))
        foot = side * self.pose.stance + 0.25 * c
        wide = 1.0 if self.build == "woman" else 1.04
        hip = c + side * 0.325
        knee = 0.5 * (hip + foot)
        ankle_y = 7.3
        return [
            (3.35, hip, 0.34 * wide), (3.9, hip, 0.335 * wide), (4.6, hip * 0.7 + knee * 0.3, 0.275 * wide),
            (5.5, knee, 0.19 * wide), (6.1, knee * 0.6 + foot * 0.4, 0.195 * wide), (ankle_y, foot, 0.095 * wide),
        ]  # fmt: skip


def limb(body: Body, joints: tuple[Array, Array, Array], radii: tuple[float, ...]) -> tuple[Array, Array, Array]:
    """Mask and cloth coordinates of a bent limb through three joints.

    Returns the anti-aliased mask, the way along it and the way across it (both hu), each (n, n).
    The two halves meet in a miter, so the coordinates are continuous at the elbow.
    """
    x, y = body.grid()
    a, b, c = joints
    d1, d2 = b - a, c - b
    l1, l2 = float(np.hypot(*d1)), float(np.hypot(*d2))
    d1, d2 = d1 / l1, d2 / l2
    second = (x - b[0]) * (d1[0] + d2[0]) + (y - b[1]) * (d1[1] + d2[1]) > 0
    along1 = (x - a[0]) * d1[0] + (y - a[1]) * d1[1]
    across1 = (y - a[1]) * d1[0] - (x - a[0]) * d1[1]
    along2 = l1 + (x - b[0]) * d2[0] + (y - b[1]) * d2[1]
    across2 = (y - b[1]) * d2[0] - (x - b[0]) * d2[1]
    along = np.where(second, along2, along1)
    across = np.where(second, across2, across1)
    r = np.interp(along, (0.0, l1, l1 + l2), radii).astype(np.float32)
    s = body.scale
    mask = np.clip((r - np.abs(across)) * s + 0.5, 0, 1)
    start = radii[0] * np.sqrt(np.clip(1 - (across / radii[0]) ** 2, 0, 1))
    mask = mask * np.clip((along + start) * s + 0.5, 0, 1) * np.clip((l1 + l2 - along) * s + 0.5, 0, 1)
    return mask, along, across / np.maximum(r, 1e-3)
