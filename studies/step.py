"""What a step costs under the trunk hook: `python -m studies.step --model runs/student --predictor runs/predictor`.

One video is denoised in three ways in turn: by the pipeline alone, with the hook on it and every step full, and with
every step but the first predicted. Ratios are of neighbours in time, so that a machine that slows down does so for all:

    hook       what it adds to a step, 0.01 is 1 %
    predicted  a predicted step over a full one: c in the ideal speedup 100 / (full + predicted c)
"""

import json
from contextlib import nullcontext
from typing import Annotated

import typer

from studies.distill.cost import WARM_UP
from vidaccel.bench.environment import environment
from vidaccel.cache.attach import attach
from vidaccel.cli.common import Debug, quiet_libraries, reported
from vidaccel.config.generate import GenerateConfig
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.numbers import quartiles
from vidaccel.sampling import generate

PROMPT = "a red circle moving right on black"

app = typer.Typer()


@app.command()
@reported
def main(
    model: Annotated[str, typer.Option(help="A student's folder.")],
    predictor: Annotated[str, typer.Option(help="A predictor's folder, reuse or taylor.")],
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way is timed.")] = 30,
    debug: Debug = False,
) -> None:
    """Time the three ways and print a JSON object."""
    quiet_libraries()
    typer.echo(json.dumps(measured(load_pipeline(model), predictor, rounds) | {"environment": environment("cpu")}))


def measured(loaded: LoadedPipeline, predictor: str, rounds: int) -> dict[str, object]:
    """Quartiles of `hook` and `predicted` over the rounds, see above, and the steps of a video."""
    steps, hook, share = loaded.default("steps"), [], []
    for _ in range(WARM_UP + rounds):
        alone = denoise_seconds(loaded)
        hooked, predicted = (
            denoise_seconds(loaded, predictor=predictor, steps=steps, full_steps=full)
            for full in (list(range(steps)), [0])
        )
        hook.append(hooked / alone - 1)
        share.append((steps * predicted / hooked - 1) / (steps - 1))
    return {"steps": steps, "hook": quartiles(hook[WARM_UP:]), "predicted": quartiles(share[WARM_UP:])}


def denoise_seconds(loaded: LoadedPipeline, **attached: object) -> float:
    """Of one video, with what is to be attached."""
    with attach(loaded, **attached) if attached else nullcontext() as attachment:
        return generate(loaded, [PROMPT], GenerateConfig(), [0], attachment).seconds["denoise"]


if __name__ == "__main__":
    app(prog_name="python -m studies.step")
