"""Scenes drawn by their numbers are the same in whatever process."""

import subprocess
import sys

import pytest

from vidaccel.errors import UserError
from vidaccel.worlds.sprites import drawing
from vidaccel.worlds.sprites.drawing import Scenes
from vidaccel.worlds.sprites.source import RenderedScenes
from vidaccel.worlds.sprites.world import is_held_out


def test_they_are_those_that_are_encoded_for_a_folder():
    source = RenderedScenes(3, 5, 0.7, {"cross": 3})
    told = Scenes(5, "train", 0.7, {"cross": 3}).many(3, 1, processes=1)
    assert told == [(source.scene(i), [source.record(i)["caption"]]) for i in range(3)]


def test_the_number_of_processes_changes_nothing(monkeypatch):
    scenes = Scenes(2, "held_out", 0.6, {"gray": 2}, lamps=0.5)
    alone = scenes.many(7, 2, processes=1)
    monkeypatch.setattr(drawing, "PART", 3)
    assert scenes.many(7, 2, processes=2) == alone
    assert scenes.many(5, 3, processes=1)[4][0] == alone[4][0]


def test_more_captions_are_other_words_of_the_same_scene():
    for scene, captions in Scenes(1, pair_share=1.0).many(20, 4, processes=1):
        assert len(captions) == 4
        assert all(scene.background in caption and " and " in caption for caption in captions)
    assert len(set(captions)) > 1


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scenes_are_of_their_split(split):
    for scene, _ in Scenes(1, split).many(40, 0, processes=1):
        assert {is_held_out(sprite.triple) for sprite in scene.sprites} == {split == "held_out"}


def test_drawing_loads_nothing_heavy():
    code = "import sys, vidaccel.worlds.sprites.drawing; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "vidaccel" in loaded
    assert {"torch", "numpy", "diffusers", "transformers"}.isdisjoint(loaded)


def test_odds_of_nothing_are_the_callers_mistake():
    with pytest.raises(UserError, match="odds of hexagon"):
        Scenes(0, odds={"hexagon": 2}).many(10, 1)
