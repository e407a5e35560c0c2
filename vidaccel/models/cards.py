"""README.md of a folder that a training leaves: what it is, how it is called, how it was made, what to pass on."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from vidaccel.families.base import DiTFamily
from vidaccel.models.conditioning import Conditioning

README = "README.md"


def student_card(
    family: DiTFamily,
    teacher: str,
    root: str,
    conditioning: Conditioning | None,
    *,
    command: str,
    config: Mapping[str, Any],
    call: Mapping[str, Any],
    adapter: bool,
    measured: str | None = None,
    undistilled: str | None = None,
) -> str:
    """Of a model folder; `call` is the one in its run.json, `config` the settings of `command`, `root` the model that
    the teacher was distilled from, if it was, and `undistilled` the one of two transformers that is the teacher's."""
    size = [call.get(name, getattr(family.defaults, name)) for name in ("num_frames", "width", "height")]
    scales = conditioning.config.guidance_range if conditioning else None
    learnt = f" (it learnt {scales[0]:g} to {scales[1]:g})" if scales else ""
    negative = f", away from `{call['negative_prompt']}`" if call.get("negative_prompt") else ""
    kind = "An adapter" if adapter else "A copy"
    lines = "".join(f"    {line}\n" for line in (measured or "").splitlines())
    gates = (
        f"""## How far it has learnt

On clips that were kept out of its training, 0 for an untrained student and 1 for an exact one (gates.json):

{lines}
"""
        if lines
        else ""
    )
    first = f", by way of {teacher}" if root != teacher else ""
    how = f"distilled to {call['steps']} steps of one pass each by `{command}`"
    if "student" in config:
        how = f"distilled to {call['steps']} steps of one pass each by others, whose weights `{command}` read"
    own_scale = conditioning is not None and conditioning.config.embeds == ("g",) and not adapter
    exportable = own_scale and not undistilled
    exported = (
        "\n`vidaccel generate --export model=path/to/this/folder -o ANOTHER` writes one that it loads, whose scale is "
        "fixed (`guidance=`).\n"
        if exportable
        else ""
    )
    more = f"vidaccel distill teacher=path/to/this/folder denoiser={undistilled} -o ANOTHER"
    half = f"\nNo model yet: its {undistilled} is as it was, and `{more}` distils it too.\n" if undistilled else ""
    return f"""# A student of {root}

{kind} of that {family.title}{first}, {how}.
{half}
## Call it

    vidaccel generate "a cat on a surfboard" model=path/to/this/folder

```python
import vidaccel

loaded = vidaccel.load_pipeline("path/to/this/folder", device="cuda")
video = loaded.pipe("a cat on a surfboard").frames[0]
```

Called so it makes {size[0]} frames of {size[1]} x {size[2]} in {call["steps"]} steps, guided with a scale of \
{call["guidance"]:g}{learnt}{negative}.
`steps=`, `num_frames=`, `height=`, `width=` and `guidance=` change that on the command line, the pipeline's own
arguments and `loaded.guidance = 4` in Python.

diffusers alone does not load this folder, and is not to be made to: its classes have no place for what tells this
transformer how far a step goes, and the videos would be wrong.
{exported}
## How it was made

By `{command}` with these settings; run.json has versions, seed and hashes beside them.

```yaml
{_yaml(config)}```

{gates}## Pass it on

All of the folder without `checkpoints/` and `samples/`. Whether that is allowed is decided by the licence of the model
it was distilled from.
"""


def exported_card(
    family: DiTFamily, source: str, pipeline: str, arguments: Mapping[str, Any], guidance: str | None
) -> str:
    """Of a folder for diffusers alone; `arguments` are those of its call, `guidance` the scale that a student is fixed
    at."""
    said = "".join(f", {name}={value!r}" for name, value in arguments.items())
    fixed = (
        f", its guidance fixed at {guidance}: one pass a step, without any of the pipeline's own" if guidance else ""
    )
    return f"""# {source} for diffusers

A {family.title}{fixed}.

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/this/folder")
video = pipe("a cat on a surfboard"{said}).frames[0]
```

Whether it may be passed on is decided by the licence of the model that it came from.
"""


def predictor_card(
    *,
    student: str,
    command: str,
    config: Mapping[str, Any],
    budgets: Mapping[int, list[int]],
    learnt: Sequence[str] = (),
) -> str:
    """Of a predictor's folder; `budgets` are numbers of full steps by the steps of their grid, `learnt` lines of how
    near it comes."""
    lines = "".join(f"    {line}\n" for line in learnt)
    errors = (
        f"""## How far it has learnt

Errors of the final latents beside the student's own run of full steps, by the steps that are full. Reuse gives the
last full step's output again: a share of 1 is no better than that, and 0 is exact. run.json has them too.

{lines}
"""
        if lines
        else ""
    )
    steps, few = next(iter((steps, numbers[len(numbers) // 3]) for steps, numbers in budgets.items()))
    known = "; ".join(f"{_listed(numbers)} of {steps} steps" for steps, numbers in budgets.items())
    return f"""# A predictor for {student}

Stands in for the transformer of that student, and of no other, on the steps that are not run in full.

## Call it

    vidaccel generate "a cat on a surfboard" model={student} predictor=path/to/this/folder budget={few} steps={steps}

```python
import vidaccel

loaded = vidaccel.load_pipeline("{student}", device="cuda")
with vidaccel.attach(loaded.pipe, predictor="path/to/this/folder", steps={steps}, budget={few}):
    video = loaded.pipe("a cat on a surfboard", num_inference_steps={steps}).frames[0]
```

`budget` is how many steps are full. schedule.json says which, for {known}.

## How it was made

By `{command}` with these settings; run.json has versions, seed and hashes beside them.

```yaml
{_yaml(config)}```

{errors}## Pass it on

All of the folder without `checkpoints/` and `trajectories/`, together with the student.
"""


def _listed(numbers: list[int]) -> str:
    ends = f"{numbers[0]} to {numbers[-1]}"
    return ends if numbers == list(range(numbers[0], numbers[-1] + 1)) else ", ".join(map(str, numbers))


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
