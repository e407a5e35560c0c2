"""A faster way of the same convolutions: the same frames, and PyTorch's own way wherever it is not the slower one."""

from copy import deepcopy

import pytest
import torch

from tests.tiny import TEXT_TO_VIDEO
from vidaccel.models import decoding
from vidaccel.models.decoding import speed_up
from vidaccel.models.loading import load_pipeline

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def taken(monkeypatch):
    """The inputs of the convolutions that ran by oneDNN."""
    seen, real = [], decoding.convolved_by_onednn
    monkeypatch.setattr(decoding, "convolved_by_onednn", lambda conv, x, *rest: seen.append(x) or real(conv, x, *rest))
    return seen


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_an_autoencoder_that_was_loaded_gives_the_frames_of_diffusers(family, saved, taken):
    loaded = load_pipeline(saved(family))
    vae = loaded.pipe.vae
    plain = type(vae).from_pretrained(saved(family) / "vae")
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    latents = torch.randn(1, channels, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    told = {"temb": torch.tensor([0.05])} if vae.config.get("timestep_conditioning") else {}
    with torch.no_grad():
        frames = plain.decode(latents, **told).sample
        torch.testing.assert_close(vae.decode(latents, **told).sample, frames, rtol=1e-4, atol=1e-5)
        assert taken
        if loaded.family.batched_autoencoder:
            told = {name: value.expand(2) for name, value in told.items()}
            one, both = len(taken), vae.decode(latents.expand(2, *latents.shape[1:]), **told).sample
            torch.testing.assert_close(both[:1], frames, rtol=1e-4, atol=1e-5)
            assert not any(len(x) > 1 for x in taken[one:])


def test_other_types_two_clips_and_gradients_go_pytorchs_way(taken):
    conv = torch.nn.Conv3d(2, 2, 3)
    before = deepcopy(conv)
    speed_up(conv)
    x = torch.randn(1, 2, 3, 3, 3)
    assert torch.equal(conv(x), before(x)) and conv(x).requires_grad
    with torch.no_grad():
        conv(x.expand(2, -1, -1, -1, -1))
        conv.bfloat16()(x.bfloat16())
        assert not taken
        conv.float()(x)
    assert len(taken) == 1
