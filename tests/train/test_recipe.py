import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import tyro

from famt.jobs.options import MakeShards, PrecomputeFreq, RayPretrain, RefreshScores
from famt.pipeline.errors import UserError
from famt.pipeline.options import FREE, JoinConfig, annotated
from famt.train import recipe
from famt.train.command_line import parse
from famt.train.config import Pretrain
from famt.train.evaluate.evaluators import EVALUATORS
from famt.train.program_options import Export
from famt.train.signals.config import AttentionConfig, FrequencyConfig

ON = ["--shards", "a", "--cache", "c", "--out", "o"]


def _parse(name, *more):
    return parse(["--recipe", str(name), *ON, *more], None)


def _write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_one_that_the_program_takes_and_says_what_comes_of_it(name):
    config, told = _parse(name), recipe.load(name)
    assert config.recipe == name
    for text in (told.about, told.cost, told.result):
        assert text
    assert "\n" not in told.about
    assert len(told.about) <= 80


def test_a_run_that_names_no_recipe_has_the_default_one():
    assert parse(ON, None) == _parse("famt")
    by_path = recipe.load("train/recipes/famt.toml")
    assert by_path.options == recipe.load("famt").options


@pytest.mark.parametrize(
    ("name", "method", "masked", "thrown", "frequency", "attention"),
    [
        ("mae", "mae", 0.75, 0.0, "off", "off"),
        ("famt-paper", "mae", 0.45, 0.40, "refreshed", "off"),
        ("amt", "mae", 0.45, 0.40, "off", "refreshed"),
        ("simmim", "simmim", 0.6, 0.0, "off", "off"),
        ("famt-simmim", "simmim", 0.44, 0.26, "cached-then-refreshed", "rolling"),
    ],
)
def test_the_published_methods_are_as_published(name, method, masked, thrown, frequency, attention):
    config = _parse(name)
    assert config.method == method
    assert config.join == JoinConfig(masked, thrown)
    assert config.decoder == "self"
    assert (config.frequency.source, config.attention.source) == (frequency, attention)
    kinds = {"famt-paper": "frequency_attention", "amt": "cls_attention"}
    assert config.refreshed_kinds == [
        kinds.get(name, "token_frequency") for slot in (frequency, attention) if "refreshed" in slot
    ]


@pytest.mark.parametrize(
    ("name", "model", "decoder_width", "epochs", "refreshes"),
    [
        ("famt-paper", "vit_small", 128, 800, range(80, 800, 80)),
        ("amt", "vit_base", 512, 400, range(40, 400, 40)),
    ],
)
def test_the_published_schedules_are_as_the_released_code_has_them(
    name, model, decoder_width, epochs, refreshes
):
    config = _parse(name)
    sizes = config.sizes
    assert (config.model, config.epochs) == (model, epochs)
    assert (sizes.decoder_width, sizes.decoder_depth) == (decoder_width, 8)
    assert not sizes.normalise_targets
    assert config.refreshes == refreshes
    assert config.plain_until == refreshes.start  # plain MAE until the first maps
    assert config.refresh.wait


def test_maps_are_refreshed_at_every_tenth_of_a_run_unless_it_says_otherwise():
    for epochs, first in ((800, 80), (200, 20), (83, 9), (5, 1)):
        refreshes = _parse("famt", "--epochs", str(epochs)).refreshes
        assert refreshes[0] == first
        assert len(refreshes) <= 9
    assert list(_parse("famt", "--epochs", "9", "--refresh.every", "4").refreshes) == [4, 8]
    # The first is due where plain epochs end.
    plain = "--plain-epochs", "3"
    assert list(_parse("famt", "--epochs", "9", "--refresh.every", "4", *plain).refreshes) == [3, 7]
    assert not _parse("famt", "--epochs", "1").refreshes
    assert not _parse("famt", "--refresh.pin", "generation-00000007.zip").refreshes
    assert not _parse("uniform").refreshes


def test_a_file_of_ones_own_builds_on_ours_and_on_files_beside_it(tmp_path, monkeypatch):
    _write(tmp_path / "small.toml", 'extends = "mae"\noptions = "--model vit_nano --epochs 3"')
    own = _write(
        tmp_path / "own.toml",
        'extends = "small.toml"\noptions = """\n--epochs 9  # longer\n--fused 0 2"""',
    )
    config = _parse(own, "--fused", "1")
    assert config.join == JoinConfig(0.75, 0.0)
    assert (config.recipe, config.model, config.epochs) == (str(own), "vit_nano", 9)
    assert config.fused == (1,)
    assert config.frequency == FrequencyConfig(source="off")
    assert config.attention == AttentionConfig(source="off")
    monkeypatch.chdir(tmp_path)
    relative = parse(["--recipe=own.toml", *ON], None)
    assert dataclasses.replace(relative, recipe=str(own)) == _parse(own)


def test_a_file_that_builds_on_nothing_builds_on_the_default_recipe(tmp_path):
    own = _write(tmp_path / "own.toml", "options = '--epochs 9'")
    assert _parse(own) == dataclasses.replace(parse(ON, None), recipe=str(own), epochs=9)


def test_a_run_goes_on_under_another_name_of_its_options(tmp_path):
    by_recipe = _parse("mae")
    spelled_out = parse([*recipe.load("mae").options, *ON], None)
    assert dataclasses.replace(spelled_out, recipe="mae") == by_recipe
    notes = {name: beside for name, _, beside in annotated(by_recipe)}
    assert FREE in notes["recipe"]


def test_a_recipe_may_tell_the_data_too(tmp_path):
    own = _write(tmp_path / "own.toml", 'options = "--shards a b --cache c --out o"')
    config = parse(["--recipe", str(own), "--out", "elsewhere"], None)
    assert (config.shards, config.cache, config.out) == (["a", "b"], "c", Path("elsewhere"))


def test_a_recipe_may_set_options_of_the_program_that_takes_it(tmp_path):
    own = _write(tmp_path / "own.toml", 'options = "--workers 8 --gpu"')
    config = parse(["--recipe", str(own), *ON], None, RayPretrain)
    assert (config.workers, config.gpu) == (8, True)
    with pytest.raises(UserError, match=r"own\.toml: wrong options"):
        _parse(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("option = '--epochs 3'", r"own\.toml: unknown key 'option'; a recipe has extends, about"),
        ("options = 3", r"own\.toml: options must be a string"),
        ("options = '--epochs 3", r"own\.toml: Expected \"'\""),
        ("options = '--model \"vit_nano'", r"own\.toml: options: No closing quotation"),
        ("options = '--recipe mae'", r"own\.toml: options: use extends"),
        ("options = '--epochs 0'", r"own\.toml: --epochs 0 must be at least 1"),
        ("extends = 'mea'", r"own\.toml: extends mea: no such recipe; .* amt, .*simmim"),
        ("extends = 'own.toml'", r"own\.toml: extends own\.toml, which extends this one"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_its_name(tmp_path, text, message):
    own = _write(tmp_path / "own.toml", text)
    with pytest.raises(UserError, match=message):
        _parse(own)


@pytest.mark.parametrize("options", ["--modle vit_nano", "--epochs many"])
def test_a_wrong_option_is_told_with_the_file_that_it_is_in(tmp_path, capsys, options):
    _write(tmp_path / "base.toml", f"options = '{options}'")
    own = _write(tmp_path / "own.toml", "extends = 'base.toml'")
    with pytest.raises(UserError, match=r"base\.toml: wrong options, see above"):
        _parse(own)
    assert options.split()[0] in capsys.readouterr().err


def test_an_unknown_recipe_is_named():
    with pytest.raises(UserError, match=r"^--recipe mea: no such recipe; give the path of a .toml"):
        _parse("mea")


def test_a_wrong_option_is_told_with_the_help_that_shows_all(capsys):
    with pytest.raises(SystemExit):
        parse(["--mask-ratio", "0.5"], "Train.")
    assert "--help-all` shows all options" in capsys.readouterr().err


def test_help_lists_the_recipes_and_shows_what_the_one_given_sets(capsys):
    with pytest.raises(SystemExit):
        parse(["--recipe", "mae", "--help-all"], "Train.")
    text = capsys.readouterr().out
    for name in recipe.names():
        assert re.search(rf"^ *.? *{name} +{re.escape(recipe.load(name).about[:30])}", text, re.M)
    assert "0.75" in text


PROGRAMS = {
    "shards": MakeShards,
    "score": PrecomputeFreq,
    "refresh": RefreshScores,
    "export": Export,
    **{f"evaluate {name}": options for name, options in EVALUATORS.items()},
}


@pytest.mark.parametrize("name", [each for each in recipe.names() if recipe.load(each).commands])
def test_every_command_of_a_recipe_is_one_that_its_program_takes(name):
    ran_with_it = False
    for line in recipe.load(name).commands.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "torchrun":
            words = words[words.index("-m") :]
            words = words[1:]
        assert words[0] == "famt"
        words = words[1:]
        if words[0] == "evaluate":
            words = [" ".join(words[:2]), *words[2:]]
        program, *arguments = words
        if program == "pretrain":
            ran_with_it |= parse(arguments, None, RayPretrain).recipe == name
        else:
            tyro.cli(PROGRAMS[program], args=arguments)
    assert ran_with_it


def test_options_differ_where_a_run_has_other_than_the_defaults_and_new_ones_do_not():
    @dataclasses.dataclass(frozen=True)
    class Newer(Pretrain):
        novelty: int = 1

    on = {"shards": ["a"], "cache": "c", "out": Path("o")}
    attention = AttentionConfig(source="seen")
    for program in (Pretrain, Newer):
        run = program(**on, epochs=3, attention=attention)
        assert {name: value for name, value, _ in run.differing()} == {
            **on, "epochs": 3, "attention.source": "seen"
        }  # fmt: skip


def test_recipes_are_listed_and_shown(capsys):
    recipe.main(recipe.Recipes())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == recipe.names()
    recipe.main(recipe.Recipes("uniform"))
    assert tomllib.loads(capsys.readouterr().out)["about"] == recipe.load("uniform").about
