"""A chart of accuracy over a transformer's depth."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 52  # margins
INK, FAINT, LINE, POINT = "#222222", "#dddddd", "#1f5fa8", 4
DASH = 6


def depth_chart(
    title: str, accuracies: Sequence[tuple[int, float]], levels: Mapping[str, float]
) -> Image.Image:
    """A line through the accuracy behind each block, with others for comparison.

    Args:
        title: above it.
        accuracies: block and accuracy from 0 to 1, of one block at least.
        levels: accuracies that have no depth, by name, drawn as dashed lines.
    """
    chart = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(chart)
    blocks = [block for block, _ in accuracies]
    first, last = min(blocks), max(max(blocks), min(blocks) + 1)
    values = [value for _, value in accuracies] + list(levels.values())
    step = next(s for s in (0.02, 0.05, 0.1, 0.2) if max(values) - min(values) <= 8 * s or s == 0.2)
    low = int(min(values) / step) * step
    high = min(1.0, (int(max(values) / step) + 1) * step)

    def place(block, value):
        x = LEFT + (block - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - low) / max(high - low, step) * (HEIGHT - TOP - BOTTOM)
        return x, y

    draw.text((LEFT, TOP / 2), title, fill=INK, anchor="lm", font_size=15)
    for i in range(round((high - low) / step) + 1):
        x, y = place(first, low + i * step)
        draw.line((x, y, WIDTH - RIGHT, y), fill=FAINT)
        draw.text((x - 8, y), f"{low + i * step:.0%}", fill=INK, anchor="rm", font_size=12)
    for block in blocks[:: -(-len(blocks) // 20)]:
        x, y = place(block, low)
        draw.text((x, y + 6), str(block), fill=INK, anchor="mt", font_size=12)
    middle = (LEFT + WIDTH - RIGHT) / 2
    draw.text((middle, HEIGHT - 10), "block", fill=INK, anchor="mb", font_size=13)

    bottom = HEIGHT  # names of levels that lie close together go one above the other
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        x, y = place(last, value)
        for dash in range(LEFT, int(x), 2 * DASH):
            draw.line((dash, y, dash + DASH, y), fill=INK)
        bottom = min(y, bottom - 14)
        draw.text((x + 8, bottom), f"{name} {value:.1%}", fill=INK, anchor="lm", font_size=12)
    line = [place(block, value) for block, value in sorted(accuracies)]
    if len(line) > 1:
        draw.line(line, fill=LINE, width=2)
    for x, y in line:
        draw.ellipse((x - POINT, y - POINT, x + POINT, y + POINT), fill=LINE)
    return chart
