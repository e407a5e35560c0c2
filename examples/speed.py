"""Three ways to one video, as a GIF: the teacher, its few-step student, and the student with its predictor.

    python examples/speed.py -o examples/speed.gif

All three start from the same noise. Each panel stays empty for as long as its video took to denoise, and then plays it.
Times are seconds of one CPU core, which other work on the machine hardly disturbs: the least of some rounds in which
the three take turns, after one run of each that warms up. Text is encoded within them, frames are decoded outside. The
steps that the shipped predictor leaves full are those of its own schedule.
"""

import argparse
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import vidaccel

PANEL, MARGIN, HEAD, FOOT = 208, 12, 30, 48
"""Pixels: side of a video, space around it, and the lines of text above and below."""
HOLD = 1.5
"""Seconds for which the last frames stay."""
PAPER, INK, FAINT, BAR = (250, 250, 250), (20, 20, 20), (110, 110, 110), (60, 110, 200)


@dataclass(frozen=True)
class Way:
    """One way to sample."""

    title: str
    model: str
    steps: int
    call: dict[str, Any]
    """How the pipeline is told about guidance."""
    budget: int | None = None
    """Full steps, where a predictor answers on the others."""

    @property
    def passes(self) -> str:
        if self.budget:
            return f"{self.budget} full + {self.steps - self.budget} predicted passes"
        return f"{self.steps * (2 if 'true_cfg_scale' in self.call else 1)} passes"


TWO_PASSES = {"negative_prompt": "", "true_cfg_scale": 3.0, "guidance_scale": 1.0}
WAYS = (
    Way("teacher, 50 steps", "sprites/teacher", 50, TWO_PASSES),
    Way("student, 8 steps", "sprites/student", 8, {}),
    Way("student + predictor", "sprites/student", 8, {}, budget=4),
)


def sample(way: Way, loaded: Any, prompt: str, seed: int, output: str) -> tuple[Any, float]:
    """The video as frames [T, H, W, 3] in [0, 1] ("np") or as latents ("latent"), and its seconds of CPU time."""
    names = ("num_frames", "height", "width", "prompt_template", "max_sequence_length")
    own = {name: loaded.call[name] for name in names}
    predicted = nullcontext()
    if way.budget:
        predicted = vidaccel.attach(loaded, predictor="sprites/predictor", steps=way.steps, budget=way.budget)
    with predicted:
        noise, started = torch.Generator().manual_seed(seed), time.process_time()
        made = loaded.pipe(
            prompt, num_inference_steps=way.steps, generator=noise, output_type=output, **own, **way.call
        )
        return made.frames, time.process_time() - started


def measured(prompt: str, seed: int, rounds: int) -> list[tuple[np.ndarray, float]]:
    """Frames uint8 [T, H, W, 3] of each way, and its least seconds."""
    models = {way.model: vidaccel.load_pipeline(way.model) for way in WAYS}
    for loaded in models.values():
        loaded.pipe.set_progress_bar_config(disable=True)
    frames = [sample(way, models[way.model], prompt, seed, "np")[0][0] for way in WAYS]
    times = [[sample(way, models[way.model], prompt, seed, "latent")[1] for way in WAYS] for _ in range(rounds)]
    seconds = [min(column) for column in zip(*times, strict=True)]
    return [((video * 255).round().astype(np.uint8), took) for video, took in zip(frames, seconds, strict=True)]


def picture(prompt: str, made: list[tuple[np.ndarray, float]], now: float, fps: float) -> Image.Image:
    """All panels, `now` seconds after the three began."""
    width = MARGIN + len(made) * (PANEL + MARGIN)
    sheet = Image.new("RGB", (width, HEAD + PANEL + FOOT), PAPER)
    draw, plain, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(12)
    draw.text((MARGIN, 7), f'"{prompt}"', INK, plain)
    for i, (way, (video, took)) in enumerate(zip(WAYS, made, strict=True)):
        left, below = MARGIN + i * (PANEL + MARGIN), HEAD + PANEL
        if now >= took:
            frame = Image.fromarray(video[int((now - took) * fps) % len(video)])
            sheet.paste(frame.resize((PANEL, PANEL), Image.Resampling.BICUBIC), (left, HEAD))
        else:
            draw.rectangle((left, HEAD, left + PANEL - 1, below - 1), (225, 225, 225))
            draw.rectangle((left, below - 6, left + int(PANEL * now / took), below - 1), BAR)
        shown = f"{took:.2f} s" if now >= took else f"{now:.1f} s ..."
        draw.text((left, below + 6), way.title, INK, plain)
        draw.text((left, below + 27), way.passes, FAINT, small)
        draw.text((left + PANEL, below + 6), shown, INK, plain, anchor="ra")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("speed.gif"))
    parser.add_argument("--prompt", default="a red triangle moving right and a blue cross growing, on black")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    torch.set_num_threads(1)
    made = measured(given.prompt, given.seed, given.rounds)
    for way, (_, took) in zip(WAYS, made, strict=True):
        print(f"{way.title}: {way.passes}, {took:.2f} s, {made[0][1] / took:.1f}x")
    fps, slowest = 8.0, max(took for _, took in made)
    count = int((slowest + len(made[0][0]) / fps) * fps) + 1
    drawn = [picture(given.prompt, made, i / fps, fps) for i in range(count)]
    # One palette for all, and no dithering: what stands still then costs nothing.
    palette = drawn[-1].quantize(48)
    sheets = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in drawn]
    holds = [round(1000 / fps)] * (count - 1) + [round(1000 * HOLD)]
    sheets[0].save(given.output, save_all=True, append_images=sheets[1:], duration=holds, loop=0, optimize=True)
    print(f"{given.output}: {given.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
