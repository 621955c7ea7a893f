"""Pages of samples: what the model saw, what it saw masked, what it said and what that earned; one HTML file a step.

A page is self-contained: images are inlined, there is no script and nothing to fetch. Text is escaped: a response is
whatever a model can produce. Leaves out choosing the samples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from megatron_papo.data.images import decode_image
from megatron_papo.observe.html import escape, page

Picture = bytes | Image.Image
"""Compressed bytes (PNG, JPEG) or a decoded image."""

_GAP = 4
_LARGEST = 2048
_SMALL = 200
"""Images below this width are shown enlarged, pixel by pixel."""

_STYLE = """
:root { color-scheme: light dark; --line: #d9dce1; --soft: #6b7280; --card: #fff; --page: #f4f5f7; --ink: #1f2430; }
@media (prefers-color-scheme: dark) {
  :root { --line: #353a45; --soft: #9aa3b2; --card: #1d2028; --page: #14161b; --ink: #e6e8ec; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1.5rem; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.2rem; margin: 0 0 .2rem; } header p { margin: 0 0 1.2rem; color: var(--soft); }
article { display: grid; grid-template-columns: auto 1fr; gap: 1.2rem; padding: 1rem; margin-bottom: 1rem;
  border: 1px solid var(--line); border-left-width: 5px; border-radius: 6px; background: var(--card); }
article.right { border-left-color: #2e9e5b; } article.wrong { border-left-color: #d0453e; }
figure { margin: 0 0 .6rem; } figcaption, dt { font-size: .78rem; color: var(--soft); }
img { display: block; max-width: 320px; border: 1px solid var(--line); border-radius: 3px; }
img.small { image-rendering: pixelated; width: 200px; }
.views { display: flex; gap: .8rem; flex-wrap: wrap; align-content: flex-start; max-width: 660px; }
dl { margin: 0; min-width: 0; } dd { margin: 0 0 .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
dd.response { font-family: ui-monospace, monospace; font-size: .88rem; }
.badge { display: inline-block; padding: 0 .5rem; margin-right: .4rem; border: 1px solid var(--line);
  border-radius: 999px; font-size: .85rem; } .badge.total { font-weight: 600; }
"""


@dataclass(frozen=True)
class SampleRow:
    """One rollout as it is shown."""

    problem: str
    answer: str
    response: str
    reward: float
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Named parts before weighting."""
    images: tuple[Picture, ...] = ()
    masked_images: tuple[Picture, ...] = ()
    source: str = ""
    """Name of the source of the prompt, where there are several."""


def sample_page(step: int, rows: Sequence[SampleRow]) -> str:
    """The whole HTML page."""
    mean = sum(row.reward for row in rows) / max(len(rows), 1)
    which = f"{len(rows)} rollouts that were trained on, mean reward {mean:.3f}"
    head = f"<header><h1>Samples of step {step}</h1><p>{which}</p></header>"
    return page(f"Samples of step {step}", _STYLE, "\n".join([head, *map(_card, rows)]))


def as_pil(picture: Picture) -> Image.Image:
    """The decoded image as the model saw it, RGB, reduced where its edges are long: pages hold many, side by side."""
    image = decode_image(picture) if isinstance(picture, bytes) else picture.convert("RGB")
    image.thumbnail((_LARGEST, _LARGEST))
    return image


def beside_each_other(pictures: Sequence[Picture]) -> Image.Image:
    """All pictures in one row, tops aligned, on white."""
    images = [as_pil(picture) for picture in pictures]
    width = sum(image.width for image in images) + _GAP * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + _GAP
    return canvas


def _card(row: SampleRow) -> str:
    verdict = "right" if row.reward_parts.get("accuracy", row.reward) > 0.5 else "wrong"
    views = figures_of("image", row.images) + figures_of("masked image", row.masked_images)
    parts = "".join(f"<span class=badge>{escape(name)} {value:.3g}</span>" for name, value in row.reward_parts.items())
    source = f"<dt>source</dt><dd>{escape(row.source)}</dd>" if row.source else ""
    return (
        f"<article class={verdict}><div class=views>{views}</div><dl>"
        f"<dt>problem</dt><dd>{escape(row.problem)}</dd>"
        f"<dt>response</dt><dd class=response>{escape(row.response)}</dd>"
        f"<dt>answer</dt><dd>{escape(row.answer)}</dd>"
        f'<dt>reward</dt><dd><span class="badge total">{row.reward:.3g}</span>{parts}</dd>{source}</dl></article>'
    )


def figures_of(caption: str, pictures: Sequence[Picture]) -> str:
    """The pictures as HTML, each with its caption below, numbered where they are several."""
    return "".join(
        f"<figure>{_img(picture)}<figcaption>{caption}{f' {index}' if len(pictures) > 1 else ''}</figcaption></figure>"
        for index, picture in enumerate(pictures, 1)
    )


def _img(picture: Picture) -> str:
    image = as_pil(picture)
    packed = io.BytesIO()
    image.save(packed, format="PNG")
    data = base64.b64encode(packed.getvalue()).decode()
    return f'<img {"class=small " if image.width < _SMALL else ""}src="data:image/png;base64,{data}" alt="">'
