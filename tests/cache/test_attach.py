"""Attached pipelines of all families: full steps change nothing, predicted ones do what they say."""

import subprocess
import sys
from contextlib import nullcontext
from inspect import signature

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, UniPCMultistepScheduler

import vidaccel
from tests.students import for_diffusers, student
from tests.tiny import ONE_DENOISER, called, calls_of_a_step, guided, tiny_pipeline
from vidaccel.cache.attach import attach
from vidaccel.cache.attachment import Attachment
from vidaccel.cache.schedule import Schedule, write_schedules
from vidaccel.cache.trunk import Mode, Trunk
from vidaccel.errors import UserError
from vidaccel.families.fused import FusedBlock
from vidaccel.families.registry import FAMILIES as FAMILY_RECORDS
from vidaccel.families.registry import family_of_pipeline
from vidaccel.forecasters.learned import Predictor, new_predictor
from vidaccel.forecasters.multistep import FittedList, Multistep, MultistepConfig
from vidaccel.forecasters.taylor import Taylor
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.grid import Grid, GridScheduler
from vidaccel.models.loading import LoadedPipeline, as_student, load_pipeline
from vidaccel.models.step_hook import StepHook
from vidaccel.models.weight_hashes import student_hash
from vidaccel.runtime.fuse import fuse

FAMILIES = [*ONE_DENOISER, "cogvideox_i2v", "wan_vace"]  # of these two not much else is tried
STEPS = 4


def call(pipe, prompt="a red circle", steps=STEPS, guidance=4.0, seed=0, **more):
    """The latents of a generation, with true CFG in two passes unless guidance is 1."""
    arguments = {"num_inference_steps": steps, "output_type": "latent", **called(pipe), **more}
    arguments |= guided(pipe, guidance, prompt)
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **arguments).frames


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def plain(pipe):
    """What the pipeline gives by itself."""
    return call(pipe)


class OwnReuse:
    """Reuse written out for these transformers: a forward of the trunk's last block that gives stored outputs again.

    It counts calls of that block: two a step, conditional first, or one of both.
    """

    def __init__(self, pipe, full_steps):
        family = family_of_pipeline(type(pipe).__name__)
        self.block = getattr(pipe.transformer, family.block_lists[-1].name)[-1]
        self.full_steps, self.calls, self.stored, self.each = full_steps, 0, {}, calls_of_a_step(pipe)

    def __enter__(self):
        self.handle = self.block.register_forward_hook(self.replace)

    def __exit__(self, *error):
        self.handle.remove()

    def replace(self, block, inputs, output):
        step, side = divmod(self.calls, self.each)
        self.calls += 1
        if step in self.full_steps:
            self.stored[side] = output
        return self.stored[side]


def test_full_at_every_step_is_the_pipeline_itself(pipe, plain):
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=list(range(STEPS))) as attachment:
        assert torch.equal(call(pipe), plain)
    assert (attachment.full_passes, attachment.predicted_passes) == (2 * STEPS, 0)


def test_reuse_at_every_second_step_is_as_written_out_by_hand(pipe, plain):
    with OwnReuse(pipe, full_steps={0, 2}):
        expected = call(pipe)
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]) as attachment:
        got = call(pipe)
    assert torch.equal(got, expected) and not torch.equal(got, plain)
    assert (attachment.full_passes, attachment.predicted_passes) == (4, 4)


def test_detached_it_is_as_before(pipe, plain):
    forwards = {name: "forward" in vars(module) for name, module in pipe.transformer.named_modules()}
    attachment = vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0])
    call(pipe)
    attachment.detach()
    attachment.detach()
    assert torch.equal(call(pipe), plain)
    assert forwards == {name: "forward" in vars(module) for name, module in pipe.transformer.named_modules()}


def test_generations_in_a_row_know_nothing_of_each_other(pipe):
    with vidaccel.attach(pipe, predictor="taylor", steps=STEPS, full_steps=[0, 1]):
        first = call(pipe)
        other = call(pipe, "a green square on black", seed=1, guidance=1.0)
        assert torch.equal(call(pipe), first) and not torch.equal(other, first)


def test_an_exception_at_a_step_leaves_nothing_behind(pipe, plain):
    def stop(pipe, index, timestep, tensors):
        if index == 1:
            raise ArithmeticError("stopped")
        return tensors

    def broken(module, inputs):
        raise ArithmeticError("broken")

    takes = signature(type(pipe).__call__).parameters
    more = {"callback_on_step_end": stop} if "callback_on_step_end" in takes else {}
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]) as attachment:
        expected = call(pipe)
        if more:
            with pytest.raises(ArithmeticError, match="stopped"):
                call(pipe, "a green square", **more)
            assert torch.equal(call(pipe), expected)
        handle = pipe.transformer.proj_out.register_forward_pre_hook(broken)
        with pytest.raises(ArithmeticError, match="broken"):
            call(pipe, "a green square")
        handle.remove()
        assert torch.equal(call(pipe), expected)
        assert not attachment._trunks[0].remembered.contexts
    with pytest.raises(ArithmeticError), vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0]):
        handle = pipe.transformer.proj_out.register_forward_pre_hook(broken)
        call(pipe)
    handle.remove()
    assert torch.equal(call(pipe), plain)


def test_a_batch_is_its_members(pipe, plain):
    if not family_of_pipeline(type(pipe).__name__).batched:
        pytest.skip("one video a call")
    prompts = ["a red circle", "a green square on black"]
    noise = torch.randn(2, *plain.shape[1:], generator=torch.Generator().manual_seed(0))
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]) as attachment:
        together = call(pipe, prompts, latents=noise.clone())
        assert (attachment.full_passes, attachment.predicted_passes) == (4, 4)
        for index, prompt in enumerate(prompts):
            alone = call(pipe, prompt, latents=noise[index : index + 1].clone())
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-4)


def test_nothing_is_kept_once_the_last_step_is_taken(pipe):
    kept = []

    def count(module, inputs, output):
        kept.append(len(attachment._trunks[0].remembered))

    with vidaccel.attach(pipe, predictor="taylor", steps=STEPS, full_steps=[0, 1, 3]) as attachment:
        handle = pipe.transformer.register_forward_hook(count)
        call(pipe)
        handle.remove()
    # Two contexts, each of which remembers at most two full passes until its own last one.
    assert kept == ([1, 2, 3, 4, 4, 4, 2, 0] if calls_of_a_step(pipe) == 2 else [1, 2, 2, 0])


def test_two_passes_without_contexts_are_told_apart_by_their_order(pipe, monkeypatch):
    """As in HunyuanVideo's image-to-video pipeline, which opens none."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
        expected = call(pipe)
        monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda self, name, **more: nullcontext())
        assert torch.equal(call(pipe), expected)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipe.scheduler, "step", interrupt)
            call(pipe, "a green square")
        assert torch.equal(call(pipe), expected)


def test_a_pass_that_begins_in_the_middle_of_a_generation_is_full_at_first():
    """As of guidance from a step on, which HunyuanVideo-1.5's guider may have."""
    pipe = tiny_pipeline("hunyuan_video_15")
    late = pipe.guider.new(guidance_scale=4.0, enabled=True, start=0.5)
    run = {"num_inference_steps": STEPS, "output_type": "latent"} | called(pipe)
    pipe.guider = late
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0]) as attachment:
        pipe("a red circle", **run)
    assert (attachment.full_passes, attachment.predicted_passes) == (2, 4)


def test_another_number_of_steps_is_refused_and_does_no_harm(pipe, plain):
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
        expected = call(pipe)
        with pytest.raises(UserError, match=f"for {STEPS} steps, and the pipeline runs 3"):
            call(pipe, steps=3)
        assert torch.equal(call(pipe), expected)
    assert torch.equal(call(pipe), plain)


def test_attaching_twice_is_refused_and_does_no_harm(pipe, plain):
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
        expected = call(pipe)
        with pytest.raises(UserError, match="attached already"):
            vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0])
        assert torch.equal(call(pipe), expected)
    assert torch.equal(call(pipe), plain)


def test_beside_a_cache_of_diffusers_it_is_refused():
    pipe = tiny_pipeline("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(UserError, match="a cache of diffusers is enabled"):
        vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0])
    pipe.transformer.disable_cache()
    vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0]).detach()


def test_a_model_that_is_offloaded_as_a_whole_between_generations(pipe, plain):
    """What `enable_model_cpu_offload` does, with the CPU in the accelerator's place: it takes the transformer's forward
    back and hooks it again at the end of each generation."""
    for offloaded_first in (True, False):
        with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
            expected = call(pipe)
        if offloaded_first:
            cpu_offload_with_hook(pipe.transformer, "cpu")
        with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]) as attachment:
            for _ in range(2):
                if "_hf_hook" in vars(pipe.transformer):
                    remove_hook_from_module(pipe.transformer, recurse=True)
                cpu_offload_with_hook(pipe.transformer, "cpu")
                assert torch.equal(call(pipe), expected)
            assert attachment.predicted_passes == 8
        assert torch.equal(call(pipe), plain)
        remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(call(pipe), plain)


def test_a_model_that_is_offloaded_layer_by_layer():
    """What `enable_sequential_cpu_offload` does, with the CPU in the accelerator's place."""
    for name in ("hunyuan_video", "wan"):  # Wan's blocks have weights of their own, and so a hook
        pipe = tiny_pipeline(name)
        plain = call(pipe)
        with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
            expected = call(pipe)
        cpu_offload(pipe.transformer, torch.device("cpu"))
        assert {weight.device.type for weight in pipe.transformer.parameters()} == {"meta"}
        with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
            assert torch.equal(call(pipe), expected)
        assert torch.equal(call(pipe), plain)


def test_a_students_r_reaches_full_and_predicted_steps():
    pipe = tiny_pipeline("hunyuan_video_15", use_meanflow=True)
    loaded = LoadedPipeline(pipe, FAMILY_RECORDS["hunyuan_video_15"], "here", {}, {})
    plain = call(pipe)
    student = as_student(loaded, None, pipe.scheduler)
    told = call(pipe)
    assert not torch.equal(told, plain)
    with vidaccel.attach(student, predictor="reuse", steps=STEPS, full_steps=list(range(STEPS))):
        assert torch.equal(call(pipe), told)
    with vidaccel.attach(student, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
        assert not torch.equal(call(pipe), told)
    assert torch.equal(call(pipe), told)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder, and that of a predictor made for it, with schedules for two budgets."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_pipeline("wan").save_pretrained(folder / "model")
    loaded = load_pipeline(folder / "model")
    predictor = predictor_for(loaded.pipe, student=student_hash(loaded))
    predictor.save_pretrained(folder / "predictor")
    schedules = [Schedule(STEPS, (0, 2), "search"), Schedule(STEPS, (0, 1, 3), "search")]
    write_schedules(folder / "predictor" / "schedule.json", schedules)
    return folder


def predictor_for(pipe, **made_for):
    """One whose weights are large enough to matter."""
    family, kept = family_of_pipeline(type(pipe).__name__), []
    with Trunk(pipe.transformer, family) as trunk:
        trunk.choose = Mode
        handle = pipe.transformer.register_forward_hook(
            lambda *_: kept.extend(map(trunk.memory, trunk.remembered.contexts))
        )
        call(pipe, steps=1)
        handle.remove()
    tokens = kept[0][0].tokens
    predictor = new_predictor(pipe.transformer, family, tokens, tokens, blocks=1, **made_for)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return predictor.eval()


def test_a_predictors_folder_brings_its_schedules(trained):
    loaded = load_pipeline(trained / "model")
    with vidaccel.attach(loaded, predictor=trained / "predictor", budget=3, steps=STEPS) as attachment:
        got = call(loaded.pipe)
    assert (attachment.full_passes, attachment.predicted_passes) == (6, 2)
    network = Predictor.from_pretrained(trained / "predictor")
    with vidaccel.attach(loaded, predictor=network, schedule=Schedule(STEPS, (0, 1, 3))):
        assert torch.equal(call(loaded.pipe), got)
    path = str(trained / "predictor")
    with vidaccel.attach(loaded, predictor=path, steps=STEPS, full_steps=[0, 1, 3]):
        assert torch.equal(call(loaded.pipe), got)
    with vidaccel.attach(loaded, predictor=path, schedule=f"{path}/schedule.json", budget=2) as attachment:
        assert not torch.equal(call(loaded.pipe), got)
    assert attachment.full_passes == attachment.predicted_passes == 4


OWN_TIMES = [1.0, 0.9, 0.5, 0.2]
"""Sigmas for a call of HunyuanVideo's pipeline, which its scheduler shifts by 5."""


@pytest.fixture(scope="module")
def gridded():
    """A pipeline on the grid of shift 5, and a predictor that was trained for it."""
    pipe = tiny_pipeline("hunyuan_video")
    return pipe, predictor_for(pipe, steps=20, shift=5.0)


def test_a_predictor_takes_its_grid_in_any_number_of_steps(gridded):
    pipe, predictor = gridded
    for steps in (2, STEPS):
        with vidaccel.attach(pipe, predictor=predictor, steps=steps, every=2) as attachment:
            call(pipe, steps=steps)
        assert attachment.predicted_passes == attachment.full_passes == steps


def test_a_predictor_on_another_grid_is_refused_unless_forced_or_searched(gridded):
    pipe, predictor = gridded
    plain = call(pipe, sigmas=OWN_TIMES)
    listed = {"predictor": predictor, "steps": STEPS, "full_steps": [0, 2]}
    with vidaccel.attach(pipe, **listed) as attachment:
        for _ in range(2):
            with pytest.raises(
                UserError, match="predictor is for .* of shift 5, .* times 1, 0.9783, .*\nhint: .*force=true"
            ):
                call(pipe, sigmas=OWN_TIMES)
        call(pipe)
        assert attachment.predicted_passes == 4
    assert torch.equal(call(pipe, sigmas=OWN_TIMES), plain)
    searched = Schedule(STEPS, (0, 2), "search", times=tuple(pipe.scheduler.sigmas.tolist()))
    with vidaccel.attach(pipe, **listed, force=True):
        forced = call(pipe, sigmas=OWN_TIMES)
    with vidaccel.attach(pipe, predictor=predictor, schedule=searched):
        assert torch.equal(call(pipe, sigmas=OWN_TIMES), forced)
        with pytest.raises(UserError, match="schedule is for .* the times 1, .* on that of shift 5\nhint: .*=5"):
            call(pipe)
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config, shift=2.0)
    with pytest.raises(UserError, match="for the grid of shift 5, and the pipeline is on that of shift 2"):
        vidaccel.attach(pipe, **listed)
    numbers = (1.0, 0.0, 0.0, 0.0)
    on_top = FittedList((0, 2), {1: numbers, 3: (*numbers, 0.0, 0.0)}, STEPS, shift=5.0, network=True)
    predictor.scalars = Multistep(MultistepConfig(predictor.config.family, "f" * 64, (1.0, 8.0), True, (on_top,)))
    with vidaccel.attach(pipe, **listed, force=True) as attachment:  # where nothing was fitted on top of it
        call(pipe)
    assert attachment.predicted_passes == 4 and isinstance(attachment, Attachment)
    predictor.scalars, pipe.scheduler = None, own


def test_a_schedule_of_a_shift_is_refused_on_times_that_are_not_its_own(gridded):
    pipe, _ = gridded
    with vidaccel.attach(pipe, predictor="reuse", schedule=Schedule(STEPS, (0, 2), "search", 5.0)):
        call(pipe)
        with pytest.raises(UserError, match="schedule is for the grid of shift 5, and the pipeline is on .* times"):
            call(pipe, sigmas=OWN_TIMES)


def test_reuse_needs_no_grid_and_a_forecast_over_time_follows_any(gridded):
    pipe, _ = gridded
    ways = {"steps": STEPS, "full_steps": [0, 1]}
    with vidaccel.attach(pipe, predictor="reuse", **ways):
        reused = call(pipe, sigmas=OWN_TIMES)
    with vidaccel.attach(pipe, predictor="taylor", **ways) as attachment:
        followed = call(pipe, sigmas=OWN_TIMES)
        assert attachment._forecaster.grid == Grid(tuple(pipe.scheduler.sigmas.tolist()))
        call(pipe)
        assert attachment._forecaster.grid == Grid.shifted(STEPS, 5.0)
    with vidaccel.attach(pipe, predictor=Taylor(), **ways):
        assert torch.equal(call(pipe, sigmas=OWN_TIMES), followed) and not torch.equal(followed, reused)
    with vidaccel.attach(pipe, predictor=Taylor(grid=Grid.shifted(8, 5.0)), **ways):
        call(pipe)
        with pytest.raises(UserError, match="counts along the grid of shift 5"):
            call(pipe, sigmas=OWN_TIMES)


def test_sigmas_of_noise_and_not_of_times_are_only_for_what_needs_none():
    pipe = tiny_pipeline("wan")
    pipe.scheduler = UniPCMultistepScheduler()
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]) as attachment:
        call(pipe)
        assert attachment.predicted_passes == 4
    refused = pytest.raises(UserError, match="are no step grid, and they are those of the UniPC.*\nhint: .*reuse")
    with vidaccel.attach(pipe, predictor="taylor", steps=STEPS, full_steps=[0, 2]), refused:
        call(pipe)


def test_every_nth_step_is_the_list_of_them():
    pipe = tiny_pipeline("wan")
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]):
        listed = call(pipe)
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, every=2) as attachment:
        assert torch.equal(call(pipe), listed)
    assert attachment.predicted_passes == attachment.full_passes


def test_a_shipped_predictor_is_known_by_name(trained, monkeypatch):
    monkeypatch.setattr("vidaccel.worlds.sprites.SHIPPED", trained)
    loaded = load_pipeline("sprites/model")
    with vidaccel.attach(loaded, predictor="sprites/predictor", budget=3) as attachment:
        call(loaded.pipe)
    assert (attachment.full_passes, attachment.predicted_passes) == (6, 2)
    with pytest.raises(UserError, match="no folder .*lost"):
        vidaccel.attach(loaded, predictor="sprites/lost", steps=STEPS, full_steps=[0])


def test_a_pipeline_that_diffusers_loaded_is_known_by_its_files(trained, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(trained / "model")
    vidaccel.attach(pipe, predictor=trained / "predictor", budget=2).detach()
    tiny_pipeline("wan", seed=1).save_pretrained(tmp_path / "other")
    other = DiffusionPipeline.from_pretrained(tmp_path / "other")
    for steps in (None, 7):  # for which there is no schedule: whose the predictor is comes first
        with pytest.raises(UserError, match="and this is .*other"):
            vidaccel.attach(other, predictor=trained / "predictor", budget=2, steps=steps)
    vidaccel.attach(other, predictor=trained / "predictor", budget=2, force=True).detach()
    pipe.transformer = other.transformer
    with pytest.raises(UserError, match="whose weight files are not known"):
        vidaccel.attach(pipe, predictor=trained / "predictor", budget=2)


def test_a_student_that_diffusers_loaded_needs_its_conditioning(tmp_path):
    folder = for_diffusers(student(tmp_path, "wan", ("r",)))
    loaded = load_pipeline(folder)
    predictor = predictor_for(loaded.pipe, student=student_hash(loaded))
    pipe = DiffusionPipeline.from_pretrained(folder)
    places = {"schedule": Schedule(4, (0, 2))}
    with pytest.raises(UserError, match="without its conditioning/") as error:
        vidaccel.attach(pipe, predictor=predictor, **places)
    assert "vidaccel.load_pipeline" in error.value.hint
    conditioning = Conditioning.from_pretrained(folder / "conditioning")
    conditioning.attach(pipe.transformer, loaded.family)
    pipe.scheduler = GridScheduler.from_config(pipe.scheduler.config)  # Wan leaves the grid to its scheduler
    StepHook(pipe, loaded.family, conditioning, loaded.hook.guidance)
    made = []
    for one in (pipe, loaded):
        with vidaccel.attach(one, predictor=predictor, **places):
            made.append(call(getattr(one, "pipe", one)))
    assert torch.equal(*made)


def test_a_predictor_of_another_family_is_refused(trained):
    with pytest.raises(UserError, match="is for wan of width 24, and this is hunyuan_video"):
        vidaccel.attach(tiny_pipeline("hunyuan_video"), predictor=trained / "predictor", budget=2, force=True)


def test_on_a_fused_model_the_predictor_is_fused_too(trained):
    loaded = load_pipeline(trained / "model")
    with vidaccel.attach(loaded, predictor=trained / "predictor", budget=2):
        expected = call(loaded.pipe)
    with fuse(loaded.pipe.transformer, "reference"):
        with vidaccel.attach(loaded, predictor=trained / "predictor", budget=2) as attachment:
            got = call(loaded.pipe)
        assert all(isinstance(block, FusedBlock) for block in attachment._forecaster.blocks)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictor": "reuse"}, "nothing says which steps are full"),
        ({"predictor": "reuse", "budget": 2}, "how many .* and nothing which\nhint: .* forecaster=reuse student="),
        ({"predictor": "reuse", "full_steps": [0]}, "came without steps="),
        ({"predictor": "reuse", "steps": 4, "full_steps": [0, 4]}, r"lists \[4\], and there are 4 steps"),
        ({"predictor": "reuse", "steps": 4, "full_steps": [1, 2]}, "does not start at 0"),
        ({"predictor": "reuse", "steps": 4, "full_steps": [0, 2, 2]}, r"repeats \[2\]"),
        ({"predictor": "reuse", "steps": 4, "full_steps": [0, 2], "budget": 2}, "came with budget="),
        ({"predictor": "reuse", "steps": 4, "full_steps": [0, 2], "every": 2}, "full_steps= came with every="),
        ({"predictor": "reuse", "steps": 4, "every": 2, "schedule": "x"}, "every= came with schedule="),
        ({"predictor": "reuse", "every": 2}, "every= came without steps="),
        ({"predictor": "reuse", "steps": 4, "every": 0}, "every 0 steps"),
        ({"predictor": "reuse", "steps": 8, "schedule": Schedule(4, (0, 2))}, "steps=8, and the schedule is for 4"),
        ({"predictor": "reuse", "schedule": Schedule(4, (0, 2), shift=5.0)}, "grid of shift 5, and .* that of shift 3"),
        ({"predictor": "reuse", "budget": 3, "schedule": Schedule(4, (0, 2))}, "the schedule has 2 full steps"),
        ({"predictor": "predictor", "budget": 1}, "was trained for the student"),
        (
            {"predictor": "predictor", "force": True},
            "2 schedules for any steps\nhint: choose budget=2 or 3 with steps=4",
        ),
        ({"predictor": "predictor", "force": True, "budget": 1}, "no schedule for budget=1"),
        ({"predictor": "predictor", "force": True, "budget": 2, "steps": 8}, "no schedule for budget=2 with steps=8"),
        ({"predictor": "nowhere", "steps": 4, "full_steps": [0]}, "no folder .*nowhere\nhint: .* reuse, taylor"),
        ({"predictor": "model", "steps": 4, "full_steps": [0]}, "is no predictor"),
        ({"predictor": "model"}, "is no predictor"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(trained, arguments, message):
    predictor = arguments["predictor"] if arguments["predictor"] == "reuse" else trained / arguments["predictor"]
    pipe = tiny_pipeline("wan")
    with pytest.raises(UserError, match=message):
        vidaccel.attach(pipe, **arguments | {"predictor": predictor})
    assert all("forward" not in vars(module) for module in pipe.transformer.modules())


def test_the_package_is_imported_without_torch():
    code = "import sys, vidaccel; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert vidaccel.attach is attach
    with pytest.raises(AttributeError, match="no attribute 'detach'"):
        vidaccel.detach  # noqa: B018
