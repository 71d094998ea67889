"""Product photos drawn by arithmetic: fruit, soup, boxes, bottles, cakes and cups on tables, each also on a plain ground.

Everything is painted on two canvases at once. They differ in what is behind the product: a wall with things on it and a table
of wood, stone or cloth, or a plain studio ground. So an edit "clean up the background" has a target. Shading, cast shadows and
one light make edits visible. Deterministic in the random generator given. Not realistic on purpose.

Canvases are fp32 (2, H, W, 3) in 0 … 1: as photographed, and on plain ground; `photo` gives them as uint8. Masks are (H, W).
"""

from collections.abc import Callable

import numpy as np

Colour = tuple[float, float, float] | np.ndarray


class Canvas:
    """Two pictures being painted back to front, at twice their final size, with one light for everything on them."""

    def __init__(self, height: int, width: int, random: np.random.Generator):
        self.height, self.width, self.random = 2 * height, 2 * width, random
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32) / self.width
        zoom, right, down = random.uniform((0.9, -0.06, -0.04), (1.15, 0.06, 0.02))
        self.x, self.y = zoom * (x - 0.5) + 0.5 + right, zoom * (y - 0.5) + 0.5 + down
        angle = random.uniform(0.2, 0.8) * np.pi
        light = np.array([np.cos(angle), -np.sin(angle), 0.9])
        self.light = light / np.linalg.norm(light)
        self.pixels = np.zeros((2, self.height, self.width, 3), np.float32)
        self.bottom = self.height / self.width

    def paint(self, mask: np.ndarray, colour: Colour) -> None:
        """Lay a colour, or a picture (H, W, 3), over both canvases where `mask` is 1, blended where it is between 0 and 1."""
        self.pixels += mask[..., None] * (np.asarray(colour, np.float32) - self.pixels)

    def ground(self, wall: Colour, top: Colour, horizon: float, grain: tuple[float, float]) -> None:
        """A wall, softly lit from one side, above a table. grain: waves across and along the table, in radians a width."""
        lit = 0.85 + 0.25 * (self.x if self.light[0] > 0 else 1 - self.x) - 0.15 * self.y
        photographed, plain = self.pixels
        plain[:] = np.array([0.88, 0.87, 0.85], np.float32) * (0.88 + 0.12 * self.y / self.bottom)[..., None]
        photographed[:] = np.asarray(wall, np.float32) * lit[..., None]
        self._clutter(horizon)
        waves = sum(np.sin(self.y * f + 1.5 * np.sin(self.x * g) + p) for f, g, p in self.random.uniform(3, 40, (4, 3)))
        across, along = grain
        weave = np.sin(self.x * across + 1) * np.sin(self.y * along)
        shade = (0.9 + 0.03 * waves + 0.05 * weave) * (0.75 + 0.35 * self.y / self.bottom)
        table = np.asarray(top, np.float32) * shade[..., None]
        photographed += soft(self.y - horizon, 0.006)[..., None] * (table - photographed)

    def _clutter(self, horizon: float) -> None:
        """Pictures, jars and shelves on the wall, behind the table; none on the plain ground."""
        photographed = self.pixels[0]
        for _ in range(self.random.integers(2, 6)):
            x, y, w, h = self.random.uniform((0, 0, 0.04, 0.04), (1, 0.9 * horizon, 0.2, 0.16))
            box = (np.abs(self.x - x) < w) & (np.abs(self.y - y) < h)
            round_ = soft(self.ellipse(x, y, w, h) * w, 0.006)
            mask = box if self.random.random() < 0.5 else round_
            photographed += mask[..., None] * (self.random.uniform(0.2, 0.8, 3) - photographed)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        """(H, W) of 1 − distance from the centre in radii: 0 on the rim, 1 in the middle."""
        return 1 - np.sqrt(((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2)

    def shadow(self, cx: float, cy: float, rx: float, ry: float) -> None:
        """A soft shadow on the table, away from the light."""
        place = cx - 0.25 * rx * self.light[0], cy + 0.15 * ry, 1.25 * rx, 1.25 * ry
        self.pixels *= (1 - 0.5 * np.clip(self.ellipse(*place) * 2.2, 0, 1))[..., None]

    def ball(self, cx: float, cy: float, r: float, colour: Colour, mottle: float = 0.05) -> None:
        """A sphere with diffuse light, a highlight and a slightly uneven skin."""
        dx, dy = (self.x - cx) / r, (self.y - cy) / r
        dz = np.sqrt(np.clip(1 - dx**2 - dy**2, 0, 1))
        facing = np.clip(dx * self.light[0] + dy * self.light[1] + dz * self.light[2], 0, 1)
        a, b, c = self.random.uniform(4, 12, 3)
        skin = 1 + mottle * np.sin(a * dx + 3 * np.sin(b * dy)) * np.cos(c * dy + 2 * dx)
        diffuse, highlight = (0.35 + 0.75 * facing) * skin, 0.45 * facing**24
        lit = np.asarray(colour, np.float32) * diffuse[..., None] + highlight[..., None]
        self.paint(soft(self.ellipse(cx, cy, r, r) * r, 0.004), lit)

    def plate(self, cx: float, cy: float, r: float, colour: Colour, flat: float = 0.42) -> None:
        """A plate seen from the side: rim, well and shadow."""
        self.shadow(cx, cy + 0.05 * r, r, flat * r)
        for size, tone in ((1.0, 0.9), (0.96, 1.0), (0.7, 0.88), (0.68, 0.96)):
            slope = 1 + 0.12 * (self.x - cx) / r * self.light[0]
            inside = self.ellipse(cx, cy, size * r, size * flat * r) * r
            self.paint(soft(inside, 0.004), np.asarray(colour, np.float32) * (tone * slope)[..., None])

    def box(self, cx: float, bottom: float, w: float, h: float, colour: Colour, label: Colour) -> None:
        """A carton with a front, a darker side and a label."""
        self.shadow(cx + 0.1 * w, bottom, 0.75 * w, 0.16 * w)
        depth = 0.28 * w
        side = (self.x > cx + w / 2) & (self.x < cx + w / 2 + depth)
        slant = (self.x - cx - w / 2) * 0.35
        side &= (self.y < bottom - slant) & (self.y > bottom - h - slant)
        self.paint(side.astype(np.float32), np.asarray(colour) * (0.6 if self.light[0] < 0 else 0.8))
        top = (self.y <= bottom - h) & (self.y > bottom - h - 0.35 * depth)
        lean = (bottom - h - self.y) / 0.35
        top &= (self.x > cx - w / 2 + lean) & (self.x < cx + w / 2 + lean)
        self.paint(top.astype(np.float32), np.minimum(np.asarray(colour) * 1.2, 1))
        front = (np.abs(self.x - cx) < w / 2) & (self.y < bottom) & (self.y > bottom - h)
        lit = np.asarray(colour, np.float32) * (1.0 - 0.15 * (self.y - bottom + h) / h)[..., None]
        self.paint(front.astype(np.float32), lit)
        stripe = front & (np.abs(self.y - bottom + 0.55 * h) < 0.16 * h)
        self.paint(stripe.astype(np.float32), label)
        dot = soft(self.ellipse(cx, bottom - 0.55 * h, 0.11 * w, 0.11 * w) * w, 0.004)
        self.paint(dot * stripe, np.asarray(colour) * 0.9)

    def finish(self) -> np.ndarray:
        """Vignette and grain; scaled down. uint8 (2, H, W, 3)."""
        centre = self.ellipse(0.5, self.bottom / 2, 0.95, 0.95 * self.bottom)
        pictures = self.pixels * (0.85 + 0.15 * np.clip(centre + 0.45, 0, 1))[..., None]
        pictures += 0.012 * self.random.standard_normal(pictures.shape[1:], dtype=np.float32)
        small = np.clip(pictures, 0, 1).reshape(2, self.height // 2, 2, self.width // 2, 2, 3).mean((2, 4))
        return (small * 255).round().astype(np.uint8)


def soft(distance: np.ndarray, edge: float) -> np.ndarray:
    """1 inside (distance > 0), 0 outside, blended over `edge`."""
    return np.clip(distance / edge + 0.5, 0, 1).astype(np.float32)


def fruit(canvas: Canvas, colour: Colour) -> None:
    """Three to six fruits on a plate, the far ones first."""
    cx, cy, r = 0.5, 0.66 * canvas.bottom, canvas.random.uniform(0.36, 0.42)
    canvas.plate(cx, cy, r, (0.93, 0.92, 0.9))
    count = canvas.random.integers(3, 7)
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False) + 0.4
    places = [(cx + 0.48 * r * np.cos(a), cy - 0.05 + 0.2 * r * np.sin(a)) for a in angles]
    for x, y in sorted(places, key=lambda place: place[1]):
        size = canvas.random.uniform(0.26, 0.33) * r
        canvas.shadow(x, y + 0.8 * size, size, 0.3 * size)
        canvas.ball(x, y, size, shade(colour, canvas.random))


def soup(canvas: Canvas, colour: Colour) -> None:
    """A bowl of something, with things floating in it."""
    cx, cy, r = 0.5, 0.6 * canvas.bottom, canvas.random.uniform(0.32, 0.38) * min(1.0, canvas.bottom)
    glaze = shade((0.3, 0.4, 0.55), canvas.random, 0.25)
    canvas.shadow(cx, cy + 0.75 * r, 0.85 * r, 0.25 * r)
    below = canvas.ellipse(cx, cy, r, 0.95 * r) * r
    body = np.asarray(glaze, np.float32) * (0.85 - 0.5 * (canvas.x - cx) / r * -canvas.light[0])[..., None]
    canvas.paint(soft(below, 0.004) * soft(canvas.y - cy, 0.004), body)
    rim, inside = np.minimum(np.asarray(glaze) * 1.35, 1), np.asarray(colour)
    for size, tint in ((1.0, rim), (0.93, 0.75 * inside), (0.9, inside)):
        canvas.paint(soft(canvas.ellipse(cx, cy, size * r, 0.4 * size * r) * r, 0.004), tint)
    for _ in range(canvas.random.integers(5, 10)):
        angle, far = canvas.random.uniform(0, 2 * np.pi), canvas.random.uniform(0, 0.62) * r
        topping = [(0.35, 0.6, 0.2), (0.9, 0.8, 0.45), (0.75, 0.25, 0.15)][canvas.random.integers(3)]
        canvas.ball(cx + far * np.cos(angle), cy + 0.36 * far * np.sin(angle), 0.075 * r + 0.02, topping)


def boxes(canvas: Canvas, colour: Colour) -> None:
    """Two or three cartons side by side, perhaps one on top."""
    bottom, width = 0.8 * canvas.bottom, canvas.random.uniform(0.24, 0.28)
    count = int(canvas.random.integers(2, 4))
    label = (0.95, 0.93, 0.86)
    heights = [canvas.random.uniform(0.8, 1.35) * width for _ in range(count)]
    for i, height in enumerate(heights):
        x = 0.5 + (i - (count - 1) / 2) * 1.14 * width - 0.03
        foot, tint = bottom + 0.02 * canvas.random.uniform(-1, 1), shade(colour, canvas.random, 0.12)
        canvas.box(x, foot, width, height, tint, label)
    if count == 2:
        canvas.ball(0.83, bottom + 0.02, 0.07, (0.85, 0.35, 0.2))


def bottles(canvas: Canvas, colour: Colour) -> None:
    """One to three bottles with labels and caps."""
    count, foot = int(canvas.random.integers(1, 4)), 0.84 * canvas.bottom
    for index in range(count):
        cx, half = 0.5 + (index - (count - 1) / 2) * 0.26, canvas.random.uniform(0.085, 0.11)
        height = canvas.random.uniform(0.42, 0.56) * canvas.bottom
        tint = np.asarray(shade(colour, canvas.random), np.float32)
        canvas.shadow(cx, foot, 1.3 * half, 0.35 * half)
        round_ = np.clip(1 - ((canvas.x - cx) / half) ** 2, 0, 1)
        lit = (0.45 + 0.5 * np.sqrt(round_) + 0.25 * (canvas.x - cx) / half * canvas.light[0])[..., None]
        neck = foot - 0.7 * height
        shoulder = np.clip((canvas.y - neck + 0.12 * height) / (0.12 * height), 0.34, 1)
        body = soft(half * shoulder - np.abs(canvas.x - cx), 0.006) * soft(foot - canvas.y, 0.006)
        canvas.paint(body * soft(canvas.y - foot + height, 0.006), tint * lit)
        label = soft(half - np.abs(canvas.x - cx), 0.006) * soft(
            0.13 * height - np.abs(canvas.y - foot + 0.33 * height), 0.006
        )
        canvas.paint(label, np.array([0.95, 0.93, 0.86], np.float32) * lit)
        cap = soft(0.38 * half - np.abs(canvas.x - cx), 0.006) * soft(
            0.05 * height - np.abs(canvas.y - foot + height), 0.006
        )
        canvas.paint(cap, (0.2, 0.2, 0.22))


def cake(canvas: Canvas, colour: Colour) -> None:
    """A round cake on a stand, with icing and berries."""
    cx, top, r = 0.5, 0.5 * canvas.bottom, canvas.random.uniform(0.24, 0.3)
    tall, tint = canvas.random.uniform(0.16, 0.24), np.asarray(shade(colour, canvas.random), np.float32)
    canvas.plate(cx, top + tall, 1.25 * r, (0.93, 0.93, 0.95))
    round_ = np.clip(1 - ((canvas.x - cx) / r) ** 2, 0, 1)
    lit = (0.5 + 0.4 * np.sqrt(round_) + 0.2 * (canvas.x - cx) / r * canvas.light[0])[..., None]
    side = soft(r - np.abs(canvas.x - cx), 0.006) * soft(canvas.y - top, 0.006)
    floor = top + tall + 0.4 * r * np.sqrt(round_)
    canvas.paint(side * soft(floor - canvas.y, 0.006), tint * lit)
    band = soft(0.03 - np.abs(canvas.y - top - 0.55 * tall - 0.4 * r * np.sqrt(round_)), 0.006)
    canvas.paint(side * band, np.array([0.97, 0.94, 0.88], np.float32) * lit)
    canvas.paint(soft(canvas.ellipse(cx, top, r, 0.4 * r) * r, 0.004), np.minimum(1.15 * tint, 1))
    berry = [(0.75, 0.12, 0.15), (0.25, 0.2, 0.45), (0.95, 0.93, 0.9)][canvas.random.integers(3)]
    for angle in np.linspace(0, 2 * np.pi, canvas.random.integers(5, 9), endpoint=False):
        canvas.ball(cx + 0.66 * r * np.cos(angle), top - 0.02 + 0.26 * r * np.sin(angle), 0.11 * r, berry)


def cup(canvas: Canvas, colour: Colour) -> None:
    """A cup on a saucer, with a handle and something to drink."""
    cx, rim, r = 0.48, 0.45 * canvas.bottom, canvas.random.uniform(0.17, 0.22)
    tall, glaze = 1.35 * r, np.asarray(shade((0.92, 0.91, 0.88), canvas.random, 0.1), np.float32)
    canvas.plate(cx, rim + tall, 1.6 * r, glaze)
    handle = canvas.ellipse(cx + 1.1 * r, rim + 0.5 * tall, 0.42 * r, 0.42 * r)
    canvas.paint(soft(0.18 - np.abs(handle - 0.2), 0.04), 0.85 * glaze)
    width = r * (1 - 0.3 * np.clip((canvas.y - rim) / tall, 0, 1) ** 2)
    round_ = np.clip(1 - ((canvas.x - cx) / r) ** 2, 0, 1)
    lit = (0.55 + 0.4 * np.sqrt(round_) + 0.2 * (canvas.x - cx) / r * canvas.light[0])[..., None]
    wall = soft(width - np.abs(canvas.x - cx), 0.006) * soft(canvas.y - rim, 0.006)
    canvas.paint(wall * soft(rim + tall + 0.2 * r * np.sqrt(round_) - canvas.y, 0.006), glaze * lit)
    stripe = soft(0.16 * tall - np.abs(canvas.y - rim - 0.6 * tall), 0.006)
    canvas.paint(wall * stripe, np.asarray(colour, np.float32) * lit)
    for size, tint in ((1.0, glaze), (0.9, 0.6 * glaze), (0.86, np.asarray(colour))):
        canvas.paint(soft(canvas.ellipse(cx, rim, size * r, 0.38 * size * r) * r, 0.004), tint)


def shade(colour: Colour, random: np.random.Generator, spread: float = 0.08) -> Colour:
    """A colour near `colour`."""
    return np.clip(np.asarray(colour) * random.uniform(1 - spread, 1 + spread, 3), 0, 1)


SCENES: dict[str, Callable[[Canvas, Colour], None]] = {
    "fruit": fruit,
    "soup": soup,
    "boxes": boxes,
    "bottles": bottles,
    "cake": cake,
    "cup": cup,
}
WALLS = ((0.86, 0.84, 0.8), (0.62, 0.7, 0.74), (0.72, 0.62, 0.52), (0.55, 0.58, 0.5), (0.45, 0.42, 0.46))
TABLES: tuple[tuple[Colour, tuple[float, float]], ...] = (
    ((0.56, 0.38, 0.24), (4.0, 60.0)),  # wood
    ((0.75, 0.62, 0.46), (3.0, 90.0)),
    ((0.82, 0.8, 0.77), (9.0, 7.0)),  # stone
    ((0.36, 0.33, 0.34), (11.0, 13.0)),
    ((0.6, 0.64, 0.72), (70.0, 70.0)),  # cloth
)


def photo(scene: str, colour: Colour, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A product of this colour as photographed, and on plain ground. uint8 (2, H, W, 3)."""
    canvas = Canvas(height, width, random)
    wall, (top, grain) = WALLS[random.integers(len(WALLS))], TABLES[random.integers(len(TABLES))]
    horizon = random.uniform(0.3, 0.45) * canvas.bottom
    canvas.ground(shade(wall, random), shade(top, random), horizon, grain)
    SCENES[scene](canvas, colour)
    return canvas.finish()
