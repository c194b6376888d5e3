"""`famt pretrain --data`: from a folder of images to an encoder, in one line."""

import json
import shlex
from pathlib import Path

import pytest
import timm
import torch
from launch import RAY, run
from PIL import Image
from runs import log_events
from samples import photo

from famt.jobs import pretrain
from famt.jobs.from_images import Images, finish, look_at, prepare, suggest
from famt.jobs.options import RayPretrain
from famt.pipeline.errors import UserError
from famt.train.command_line import parse


@pytest.fixture
def photos(tmp_path):
    for number in range(40):
        path = tmp_path / "photos" / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(number, 40, 48)).save(path)
    return tmp_path / "photos"


def test_images_are_counted_and_measured(photos):
    (photos / "class-0" / "damaged.png").write_bytes(b"none")
    assert look_at(str(photos)) == Images(count=41, classes=2, side=40)


@pytest.mark.parametrize(
    ("images", "gpu", "options"),
    [
        (Images(60_000, 10, 32), False, {"model": "vit_nano", "image-size": "32", "epochs": "10"}),
        (Images(500, 0, 370), False, {"image-size": "96", "patch-size": "8", "epochs": "400"}),
        (Images(50_000, 0, 64), True, {"model": "vit_small", "image-size": "64", "epochs": "200"}),
        (Images(1_281_167, 1000, 400), True, {"model": "vit_base", "patch-size": "16"}),
        (Images(6, 0, 400), False, {"batch-size": "1"}),
    ],
)
def test_sizes_suit_the_images_and_models_the_machine(images, gpu, options):
    assert options.items() <= suggest(images, gpu=gpu).items()


def test_what_is_given_overrides_what_is_suggested(photos, capsys):
    common = ["--data", str(photos), "--out", "run"]
    chosen = parse([*common, "--epochs", "3"], None, RayPretrain)
    assert (chosen.model, chosen.epochs, chosen.sizes.image_size) == ("vit_nano", 3, 32)
    assert chosen.recipe == "laptop"
    assert chosen.optimiser.base_learning_rate == 2e-3
    assert chosen.shards == ["run/data/shards/train-*.tar"]
    assert chosen.monitor == []
    assert "40 images, 2 classes, median side 40 px" in capsys.readouterr().err
    named = parse([*common, "--recipe", "mae", "--model", "vit_tiny"], None, RayPretrain)
    assert (named.model, named.epochs, named.sizes.patch_size) == ("vit_tiny", 800, 4)
    assert named.recipe == "mae"
    assert named.optimiser.base_learning_rate == 1.5e-4
    assert named.cache == "run/data/scores"
    assert "CPU cores: --image-size 32 --patch-size 4 --batch-size 10 --epochs 800" in (
        capsys.readouterr().err
    )
    recipe = parse([*common, "--recipe", "cifar10"], None, RayPretrain)
    assert recipe.epochs == 24
    assert "--epochs" not in capsys.readouterr().err


def test_wrong_options_are_told_before_the_images_are_looked_at(capsys):
    for wrong in (["--epoch", "3", "--out", "o"], ["--epochs", "two", "--out", "o"], []):
        with pytest.raises(SystemExit):
            parse(["--data", "missing", *wrong], None, RayPretrain)
        assert "missing is no folder" not in (told := capsys.readouterr().err)
        assert told.endswith("--help-all` shows all options\n")
    assert "--out" in told
    assert "--shards" not in told


def test_images_without_the_name_of_an_option_are_told_which_it_may_be():
    with pytest.raises(UserError, match="--data photos"):
        parse(["photos", "--out", "run"], None, RayPretrain)


@pytest.mark.slow
def test_several_ranks_are_refused_once_and_before_the_images_are_looked_at():
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "famt", "pretrain"]
    told = run(*ranks, "--data", "missing", "--out", "run", code=1).stderr
    assert told.count("error: --data trains in one process") == 1
    assert "exitcode  : 2" in told


def test_the_help_shows_data_first_and_that_it_is_enough(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], None, RayPretrain)
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines are wrapped
    assert told.index("--data ") < told.index("--shards ")
    assert told.count("(needed without --data)") == 2


def test_many_labelled_images_are_monitored_and_the_held_out_share_is_said(
    photos, monkeypatch, capsys
):
    monkeypatch.setattr("famt.jobs.from_images._MONITORED", 40)
    chosen = parse(["--data", str(photos), "--out", "run"], None, RayPretrain)
    assert chosen.monitor == ["run/data/shards/val-*.tar"]
    assert "40 images, 10% held out, 2 classes" in capsys.readouterr().err


def test_a_gpu_that_is_lacking_is_told_before_shards_are_made(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU"):
        pretrain.main(RayPretrain(data=str(photos), out=tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_tars_of_others_are_never_removed_and_half_made_ones_are_made_again(photos, tmp_path):
    data, run = tmp_path / "run" / "data", tmp_path / "run"
    tar = data / "shards" / "train-000000.tar"
    tar.parent.mkdir(parents=True)
    tar.write_bytes(b"theirs")
    with pytest.raises(UserError, match="holds tars that --data did not make"):
        prepare(str(photos), None, run, None)
    assert tar.read_bytes() == b"theirs"
    (data / "source.json").write_text('{"complete": false}')  # as a killed start leaves it
    prepare(str(photos), None, run, None)
    made = tar.read_bytes()
    assert len(made) > 10_000
    prepare(str(photos), None, run, None)
    assert tar.read_bytes() == made
    with pytest.raises(UserError, match=r"holds the images of .*photos; give another --out"):
        prepare("digits", None, run, None)


def test_the_same_folder_by_another_name_and_from_elsewhere_is_the_same_data(
    photos, tmp_path, monkeypatch
):
    (tmp_path / "link").symlink_to(photos)
    prepare(str(tmp_path / "link"), None, tmp_path / "run", None)
    prepare(f"{photos}/", None, tmp_path / "run", None)
    monkeypatch.chdir(tmp_path)
    prepare("./photos", None, Path("run"), None)


@pytest.mark.parametrize("change", ["an image more", "other labels", "other values of labels"])
def test_shards_of_other_images_or_classes_are_never_trained_on(photos, tmp_path, change):
    table = tmp_path / "labels.csv"

    def label(value):
        names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
        table.write_text("".join(["file_name,label\n", *(f"{n},{value(n)}\n" for n in names)]))

    label(len)
    prepare(str(photos), table, tmp_path / "run", None)
    labels = table
    if change == "an image more":
        Image.fromarray(photo(99)).save(photos / "class-0" / "99.png")
    elif change == "other labels":
        labels = None
    else:
        label(lambda name: name[-5])
    with pytest.raises(UserError, match=r"was made before the images or classes of .* changed"):
        prepare(str(photos), labels, tmp_path / "run", None)


def test_k_nn_is_suggested_before_a_probe_that_takes_seconds(tmp_path, capsys):
    out = tmp_path / "my run"
    (out / "encoder").mkdir(parents=True)
    (out / "data" / "shards").mkdir(parents=True)
    (out / "data" / "shards" / "val-000000.tar").touch()
    finish(out)
    *_, knn, probe = capsys.readouterr().out.splitlines()
    assert shlex.split(knn)[1:6] == ["famt", "evaluate", "knn", "--checkpoint", str(out)]
    assert probe.endswith("--poolings cls mean")


@pytest.mark.slow
def test_a_folder_becomes_an_encoder_and_the_same_command_goes_on(photos, tmp_path):
    def famt(*words, code=0):
        environment = {**RAY, "PYTHONPATH": str(Path(__file__).parents[2])}
        return run("-m", "famt", *words, code=code, cwd=tmp_path, env=environment)

    def start(out, *more, code=0):
        return famt("pretrain", "--data", "photos", "--out", out, *more, code=code)

    options = "--epochs", "3", "--batch-size", "8", "--spec.kind", "bandpass"
    for name in ("train", "jobs", "pipeline"):  # of the user's own
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    *_, page, figures = start("run", *options).stdout.splitlines()
    for said, line, made in (("page:", page, "report.html"), ("masks:", figures, "masks.png")):
        assert line.split()[:2] == [said, "famt"]
        famt(*shlex.split(line)[2:])
        assert (tmp_path / "run" / made).exists()
    encoder = timm.create_model(f"local-dir:{tmp_path / 'run' / 'encoder'}", pretrained=True)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 96)
    start("run", *options)
    assert len(log_events(tmp_path / "run", "finished")) >= 1
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 15
    assert "famt shards" in start("other", "--workers", "2", code=2).stderr
