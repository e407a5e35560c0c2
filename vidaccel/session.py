"""A model made ready as the settings of `generate` say, and the videos that it makes of prompts, one after another."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vidaccel.cache.attach import Attachment
from vidaccel.cache.whole_pass import WholePass
from vidaccel.config.generate import GenerateConfig
from vidaccel.models.calling import guidance_in_force, warn_of_guidance
from vidaccel.models.grid import Grid, ListedScheduler, shift_of
from vidaccel.models.loading import LoadedPipeline, load_pipeline, resolve_device
from vidaccel.models.text_cuts import TextCuts
from vidaccel.prompts import check_prompts
from vidaccel.runtime import prepare as runtime
from vidaccel.sampling import Generated, generate, predicted_steps, warn_of_unknown_words

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A model, loaded and prepared, with its predictor attached."""

    config: GenerateConfig
    loaded: LoadedPipeline
    runtime: dict[str, Any]
    """How it runs, by the names of the settings."""
    attachment: Attachment | WholePass | None
    seconds: float
    """That loading took."""

    def videos(self, prompts: Sequence[str]) -> Iterator[Generated]:
        """One video a prompt; video i is made of seed `config.seed + i`."""
        check_prompts(prompts)
        for prompt in prompts:
            warn_of_unknown_words(self.loaded, prompt)
        cuts = TextCuts()
        for i, prompt in enumerate(prompts):
            with cuts.noticed(self.loaded.pipe):
                made = generate(self.loaded, [prompt], self.config, [self.config.seed + i], self.attachment)
            yield made


@contextmanager
def session(config: GenerateConfig, device: str, warm_up: str | None = None) -> Iterator[Session]:
    """The model that `config` names, for the time of a `with` block.

    With a prompt to `warm_up` on, a step of it is made beforehand, or a whole video where blocks are compiled, so that
    the seconds of the videos that follow are those of a machine at work.

    Raises:
        UserError: model, predictor, machine and settings do not go together.
    """
    started = time.perf_counter()
    runtime.check(config, resolve_device(device))
    loaded = load_pipeline(config.model, device=device, dtype=config.dtype, lora=config.lora or ())
    ran = runtime.prepare(loaded, config)
    seconds = time.perf_counter() - started
    log.info("sampled with %s", said_sampling(loaded, config))
    warn_of_guidance(loaded, config.guidance)
    if warm_up is not None:
        listed = config.timesteps or config.sigmas or isinstance(loaded.pipe.scheduler, ListedScheduler)
        generate(loaded, [warm_up], config if listed else replace(config, steps=1), [config.seed])
    with predicted_steps(loaded, config) as attachment:
        if warm_up is not None and config.compile:
            generate(loaded, [warm_up], config, [config.seed], attachment)
        yield Session(config, loaded, ran, attachment, seconds)


def said_sampling(loaded: LoadedPipeline, config: GenerateConfig) -> str:
    """Steps, guidance and grid that a video is made with, each with whose they are."""
    listed = Grid.listed(config.timesteps, config.sigmas)
    given = {"steps": config.steps, "guidance": config.guidance}
    said = []
    for name, value in given.items():
        shown, whose = (loaded.default(name), loaded.says(name)) if value is None else (value, "the settings")
        if name == "guidance":
            shown, _ = guidance_in_force(loaded, config.guidance, config.two_pass)
        said.append(f"{name}={shown:g} (of {whose})")
    if listed is not None:
        said.append(f"{listed} (of the settings; by flow-match Euler)")
    elif config.shift is not None:
        said.append(f"shift={config.shift:g} (of the settings)")
    else:
        scheduler = loaded.pipe.scheduler
        shift = shift_of(scheduler, loaded.family)
        own = "times of its own" if shift is None else f"shift={shift:g}"
        said.append(f"{own} (of the model's {type(scheduler).__name__})")
    return ", ".join(said)
