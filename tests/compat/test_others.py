"""The private parts of the smaller libraries, by their names: what fails here has moved in an upgrade."""

import subprocess
import sys

import pytest
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from vidaccel.compat.accelerate import is_offloaded
from vidaccel.compat.hydra import quoted


def test_is_offloaded():
    module = nn.Linear(1, 1)
    assert not is_offloaded(module)
    add_hook_to_module(module, ModelHook())
    assert is_offloaded(module)
    remove_hook_from_module(module)
    assert not is_offloaded(module)


@pytest.mark.parametrize("text", ["plain", "a,b", "it's", "/a b/ü=1", "[1]", "${x}", "back\\slash", ""])
def test_quoted_text_comes_out_of_hydras_grammar_as_it_was(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert override.value() == text


def test_compat_itself_and_its_use_by_settings_load_nothing():
    code = "import sys, vidaccel.compat.hydra; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "hydra"} & set(done.stdout.split())
