"""Small scenes of one to three nameable objects on a nameable background.

A caption names classes and background. It never names an object's identity (two colours, a pattern, a stretch): that
can only come from a reference image. Lengths are fractions of the image's shorter side: a scene has no size of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ("ball", "star", "heart", "cup", "house", "tree", "fish", "car")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 20),
    "yellow": (252, 222, 40),
    "green": (24, 140, 60),
    "cyan": (30, 205, 210),
    "blue": (40, 70, 215),
    "purple": (135, 50, 175),
    "pink": (248, 125, 190),
    "white": (250, 250, 250),
    "brown": (120, 70, 35),
}
GREY = "grey"  # of objects without an identity
_PAINT = {**COLOURS, GREY: (150, 150, 150)}
PATTERNS = ("plain", "stripes", "dots")
BACKGROUNDS = ("grass", "sea", "sand", "night", "sunset", "wall")
PLACES = {
    "grass": "on the grass",
    "sea": "in the sea",
    "sand": "on the sand",
    "night": "in the night",
    "sunset": "at sunset",
    "wall": "by the wall",
}
STUDIO = "studio"  # plain, for reference photos; no caption names it
Split = Literal["train", "validation", "benchmark"]

_OUTLINE = (28, 24, 32)
_SUPERSAMPLING = 4  # scenes are drawn this many times larger and averaged down: cheap, exact anti-aliasing
_FIXED_POINT = 4  # fractional bits of polygon corners

Image = NDArray[np.uint8]  # H x W x 3, RGB, 0-255
Mask = NDArray[np.bool_]  # H x W


@dataclass(frozen=True)
class Identity:
    """What a reference image shows and a caption does not say."""

    primary: str
    secondary: str
    pattern: str
    stretch: float  # width / height of the shape, 0.85 to 1.15


@dataclass(frozen=True)
class Thing:
    """One object in a scene; x, y and half are fractions of the shorter side."""

    name: str
    identity: Identity
    x: float
    y: float
    half: float  # half the height of the shape
    angle: float  # radians


@dataclass(frozen=True)
class Scene:
    """Things are drawn in order: a later one covers an earlier one."""

    background: str
    things: tuple[Thing, ...]
    texture_seed: int


@dataclass(frozen=True)
class Rendering:
    """An image, the visible pixels of each thing in the scene's order, and those of its detail (roof, handle, ...)."""

    image: Image
    masks: tuple[Mask, ...]
    parts: tuple[Mask, ...]


@cache
def identities(split: Split) -> tuple[Identity, ...]:
    """All identities of a split. The three splits share no (primary, secondary, pattern)."""
    names = list(COLOURS)
    drawn = []
    for i, primary in enumerate(names):
        for j, secondary in enumerate(names):
            for k, pattern in enumerate(PATTERNS):
                # A fixed linear rule spreads the held-out ones evenly over colours and patterns.
                slot = (3 * i + 7 * j + 5 * k) % 20
                home: Split = "benchmark" if slot < 3 else "validation" if slot < 5 else "train"
                if primary != secondary and home == split:
                    drawn.append(Identity(primary, secondary, pattern, stretch=1.0))
    return tuple(drawn)


def draw_identity(rng: np.random.Generator, split: Split) -> Identity:
    """A random identity of the split, with a random stretch."""
    pool = identities(split)
    chosen = pool[int(rng.integers(len(pool)))]
    return Identity(chosen.primary, chosen.secondary, chosen.pattern, stretch=float(rng.uniform(0.85, 1.15)))


def shows_secondary(name: str, identity: Identity) -> bool:
    """Whether an object of this class shows the identity's second colour: in its pattern or on its detail."""
    return identity.pattern != "plain" or any(role == "detail" for role, _ in _shape(name))


def draw_scene(
    rng: np.random.Generator,
    names: Sequence[str],
    chosen: Sequence[Identity],
    *,
    background: str | None = None,
    aspect: tuple[float, float] = (1.0, 1.0),
    gap: float = 0.02,
) -> Scene:
    """A scene with the named objects at random places.

    `aspect` is (width, height) in units of the shorter side. Boxes keep `gap` between them; a negative one lets them
    overlap.
    """
    width, height = aspect
    count = len(names)
    low, high = {1: (0.17, 0.27), 2: (0.155, 0.215), 3: (0.14, 0.18)}.get(count, (0.1, 0.14))
    while True:
        halves = rng.uniform(low, high, count)
        xs = [float(rng.uniform(h * 1.15 + 0.01, width - h * 1.15 - 0.01)) for h in halves]
        ys = [float(rng.uniform(h + 0.01, height - h - 0.01)) for h in halves]
        if all(
            abs(xs[i] - xs[j]) > (halves[i] + halves[j]) * 1.05 + gap
            or abs(ys[i] - ys[j]) > halves[i] + halves[j] + gap
            for i in range(count)
            for j in range(i)
        ):
            break
    things = tuple(
        Thing(name, identity, x, y, float(half), angle=float(rng.uniform(-0.15, 0.15)))
        for name, identity, x, y, half in zip(names, chosen, xs, ys, halves, strict=True)
    )
    place = background if background is not None else BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(place, things, texture_seed=int(rng.integers(2**31)))


def caption(scene: Scene, template: int = 0) -> str:
    """Names every class and the background, and nothing of the identities."""
    return compose([thing.name for thing in scene.things], scene.background, template)


def compose(classes: Sequence[str], background: str, template: int = 0) -> str:
    """The caption of objects of these classes on this background; templates 0 to 2."""
    names, place = [f"a {name}" for name in classes], PLACES[background]
    joined = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    if template == 1:
        return f"a photo of {joined} {place}"
    if template == 2 and len(names) == 2:
        return f"{names[0]} next to {names[1]} {place}"
    return f"{joined} {place}"


def dress(name: str, primary: str, secondary: str, pattern: str) -> str:
    """A noun phrase: "red ball", "red and white house", "red heart with white dots"."""
    if pattern != "plain":
        return f"{primary} {name} with {secondary} {pattern}"
    return f"{primary} {name}" if secondary == primary else f"{primary} and {secondary} {name}"


def random_scenes(seed: int, *, counts: Sequence[float], split: Split) -> Iterator[tuple[Scene, str]]:
    """An endless, reproducible stream of scenes with captions; `counts[i]` is the share with i + 1 objects."""
    index = 0
    while True:
        rng = np.random.default_rng([seed, index])
        number = int(rng.choice(len(counts), p=np.asarray(counts) / sum(counts))) + 1
        names = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:number]]
        scene = draw_scene(rng, names, [draw_identity(rng, split) for _ in names])
        yield scene, caption(scene, template=int(rng.integers(3)))
        index += 1


def render(scene: Scene, *, width: int, height: int) -> Rendering:
    """Draw the scene at `width` x `height` pixels."""
    side = min(width, height) * _SUPERSAMPLING
    canvas = _background(scene, width * _SUPERSAMPLING, height * _SUPERSAMPLING)
    owner = np.zeros(canvas.shape[:2], np.uint8)
    detail = np.zeros(canvas.shape[:2], np.uint8)
    for number, thing in enumerate(scene.things, start=1):
        _draw(canvas, owner, detail, thing, side, number)
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return Rendering(
        image=np.ascontiguousarray(image, np.uint8),
        masks=tuple(_shrink(owner == n, width, height) for n in range(1, len(scene.things) + 1)),
        parts=tuple(_shrink((owner == n) & (detail == n), width, height) for n in range(1, len(scene.things) + 1)),
    )


def _shrink(mask: Mask, width: int, height: int) -> Mask:
    """A pixel belongs to the mask when at least half of it is covered."""
    return cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA) > 127


def _background(scene: Scene, width: int, height: int) -> Image:
    rng = np.random.default_rng(scene.texture_seed)
    side = min(width, height)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    canvas = np.empty((height, width, 3), np.uint8)

    def blend(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> None:
        canvas[:] = (np.array(top, np.float32) * (1 - y) + np.array(bottom, np.float32) * y).astype(np.uint8)

    def at(fraction: float) -> int:
        return int(fraction * side)

    if scene.background == "grass":
        blend((168, 214, 140), (138, 192, 108))
        for x0, y0 in rng.uniform(0, 1, (14, 2)):
            base, tip = (int(x0 * width), int(y0 * height)), (int(x0 * width) + at(0.012), int(y0 * height) - at(0.06))
            cv2.line(canvas, base, tip, (110, 165, 84), at(0.018))
    elif scene.background == "sea":
        blend((158, 205, 236), (112, 170, 214))
        for y0 in np.arange(0.1, 1.0, 0.2) + rng.uniform(-0.03, 0.03):
            points = [(x, int(y0 * height + at(0.015) * np.sin(9 * x / side + 20 * y0))) for x in range(0, width, 8)]
            cv2.polylines(canvas, [np.array(points, np.int32)], False, (190, 224, 244), at(0.02))
    elif scene.background == "sand":
        blend((240, 224, 178), (226, 204, 150))
        for x0, y0 in rng.uniform(0, 1, (22, 2)):
            cv2.circle(canvas, (int(x0 * width), int(y0 * height)), at(0.012), (206, 180, 124), -1)
    elif scene.background == "night":
        blend((30, 32, 72), (58, 58, 108))
        for x0, y0 in rng.uniform(0, 1, (12, 2)):
            cv2.circle(canvas, (int(x0 * width), int(y0 * height)), at(0.011), (235, 232, 190), -1)
    elif scene.background == "sunset":
        blend((140, 104, 168), (255, 190, 140))
        cv2.circle(canvas, (int(rng.uniform(0.2, 0.8) * width), int(0.97 * height)), at(0.16), (255, 232, 170), -1)
    elif scene.background == STUDIO:
        canvas[:] = (246, 246, 244)
    elif scene.background == "wall":
        canvas[:] = (196, 158, 146)
        for row, y0 in enumerate(range(0, height, at(0.125))):
            cv2.line(canvas, (0, y0), (width, y0), (222, 202, 190), at(0.018))
            for x0 in range(at(0.125) * (row % 2), width, at(0.25)):
                cv2.line(canvas, (x0, y0), (x0, y0 + at(0.125)), (222, 202, 190), at(0.018))
    else:
        raise ValueError(f"got background {scene.background!r}; expected one of {', '.join(BACKGROUNDS)}")
    return canvas


def _circle(x: float, y: float, rx: float, ry: float | None = None, n: int = 40) -> NDArray[np.float32]:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + (rx if ry is None else ry) * np.sin(t)], axis=1).astype(np.float32)


def _points(*corners: float) -> NDArray[np.float32]:
    return np.array(corners, np.float32).reshape(-1, 2)


def _star() -> NDArray[np.float32]:
    t = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.08, 0.5)
    return np.stack([radius * np.cos(t), radius * np.sin(t) + 0.08], axis=1).astype(np.float32)


def _heart() -> NDArray[np.float32]:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16.5, -(y + 2.5) / 15], axis=1).astype(np.float32)


@cache
def _shape(name: str) -> tuple[tuple[str, NDArray[np.float32]], ...]:
    """Polygons in [-1, 1] x [-1, 1], y down, in drawing order: `body` is patterned, `detail` secondary."""
    shapes = {
        "ball": [("body", _circle(0, 0, 1.0)), ("light", _circle(-0.4, -0.45, 0.2))],
        "star": [("body", _star())],
        "heart": [("body", _heart())],
        "cup": [
            ("detail", _circle(0.62, -0.05, 0.42, 0.45)),
            ("hole", _circle(0.62, -0.05, 0.2, 0.23)),
            ("body", _points(-0.9, -0.9, 0.6, -0.9, 0.45, 0.95, -0.75, 0.95)),
        ],
        "house": [
            ("body", _points(-0.8, -0.1, 0.8, -0.1, 0.8, 1, -0.8, 1)),
            ("detail", _points(-1, -0.1, 0, -1.05, 1, -0.1)),
            ("dark", _points(-0.2, 1, -0.2, 0.35, 0.2, 0.35, 0.2, 1)),
        ],
        "tree": [
            ("detail", _points(-0.2, 0.2, 0.2, 0.2, 0.26, 1, -0.26, 1)),
            ("body", _points(0, -1.1, 0.45, -0.45, 0.3, -0.45, 0.85, 0.45, -0.85, 0.45, -0.3, -0.45, -0.45, -0.45)),
        ],
        "fish": [
            ("detail", _points(0.4, 0, 1.05, -0.62, 1.05, 0.62)),
            ("body", _circle(-0.2, 0, 0.85, 0.6)),
            ("light", _circle(-0.62, -0.14, 0.16)),
            ("dark", _circle(-0.65, -0.14, 0.08)),
        ],
        "car": [
            (
                "body",
                _points(
                    -1.05, 0.45, -1.05, -0.05, -0.6, -0.1, -0.35, -0.6, 0.4, -0.6, 0.7, -0.1, 1.05, 0.0, 1.05, 0.45
                ),
            ),
            ("light", _points(-0.38, -0.1, -0.22, -0.42, 0.3, -0.42, 0.45, -0.1)),
            ("detail", _circle(-0.55, 0.45, 0.3)),
            ("detail", _circle(0.55, 0.45, 0.3)),
        ],
    }
    if name not in shapes:
        raise ValueError(f"got class {name!r}; expected one of {', '.join(CLASSES)}")
    return tuple(shapes[name])


def _pattern(pattern: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> Mask:
    """Where the secondary colour shows, in the shape's own coordinates."""
    if pattern == "stripes":
        return ((u + v) % 0.8) < 0.36
    if pattern == "dots":
        return ((u + 0.3) % 0.6 - 0.3) ** 2 + ((v + 0.3) % 0.6 - 0.3) ** 2 < 0.19**2
    return np.zeros(u.shape, np.bool_)


def _draw(
    canvas: Image, owner: NDArray[np.uint8], detail: NDArray[np.uint8], thing: Thing, side: int, number: int
) -> None:
    half, stretch = thing.half * side, thing.identity.stretch
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    rotation = np.array([[cos * stretch * half, -sin * half], [sin * stretch * half, cos * half]], np.float32)
    centre = np.array([thing.x * side, thing.y * side], np.float32)
    primary, secondary = _PAINT[thing.identity.primary], _PAINT[thing.identity.secondary]
    thickness = max(1, round(0.024 * side))
    reach = int(half * 1.35) + 2 * thickness
    top, left = max(0, int(centre[1]) - reach), max(0, int(centre[0]) - reach)
    window = (slice(top, int(centre[1]) + reach), slice(left, int(centre[0]) + reach))
    view = canvas[window]
    if view.size == 0:
        return
    ys, xs = np.mgrid[0 : view.shape[0], 0 : view.shape[1]].astype(np.float32)
    local = np.linalg.inv(rotation) @ np.stack([(xs + left - centre[0]).ravel(), (ys + top - centre[1]).ravel()])
    u, v = (axis.reshape(view.shape[:2]).astype(np.float32) for axis in local)
    behind = view.copy()
    for role, polygon in _shape(thing.name):
        corners = (polygon @ rotation.T + centre - np.array([left, top], np.float32)) * 2**_FIXED_POINT
        corners = [np.round(corners).astype(np.int32)]
        filled = np.zeros(view.shape[:2], np.uint8)
        cv2.fillPoly(filled, corners, 1, shift=_FIXED_POINT)
        inside = filled.astype(bool)
        edge = np.zeros(view.shape[:2], np.uint8)
        if role in ("body", "detail", "hole"):
            cv2.polylines(edge, corners, True, 1, thickness, shift=_FIXED_POINT)
        if role == "hole":
            view[inside] = behind[inside]
            owner[window][inside] = 0
        else:
            view[inside] = {"body": primary, "detail": secondary, "light": (244, 246, 250), "dark": _OUTLINE}[role]
            if role == "body":
                view[inside & _pattern(thing.identity.pattern, u, v)] = secondary
            owner[window][inside | edge.astype(bool)] = number
            detail[window][inside] = number if role == "detail" else 0
        view[edge.astype(bool)] = _OUTLINE
        owner[window][edge.astype(bool)] = number
