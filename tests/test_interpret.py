"""The pictures of a trained model: made from a finished run's checkpoint, of its own data alone."""

import json
import os
import subprocess
import sys

import conftest
import numpy as np
import pytest
import torch
from conftest import run, run_seg
from PIL import Image

import data
import interpret
import models
import study
from lab import cli, equivariance, figures, files, panels, progress, provenance


@pytest.fixture
def trained(tiny_root, tmp_path):
    assert run_seg(tiny_root, tmp_path) == 0
    return tmp_path / "seed0.pt"


@pytest.fixture
def surrogates(fashion_root, tmp_path):
    """A base model and both surrogates, tiny: their seed0.pt by name."""
    base = tmp_path / "base/seed0.pt"
    runs = {"base": [], "frozen": ["--composites", "--frozen", "--base", base, "--epochs", 1],
            "scratch": ["--composites", "--tie", 0.9], "stride": ["--down", "stride"]}
    for name, flags in runs.items():
        conftest.trained("train_cls", tmp_path / name, "--train-images", 256, *flags,
                         root=fashion_root)
    return {name: tmp_path / name / "seed0.pt" for name in runs}


def draw(*flags):
    return run("interpret", *flags)


def draw_study(results):
    argv = ["figures", "--protocol", "smoke", "--results", str(results)]
    assert cli.guard(lambda: study.main(argv)) == 0


def test_segmentation_figure(trained, tiny_root, tmp_path):
    path = tmp_path / "new/figure.png"
    assert draw("--checkpoint", trained, "--data-root", tiny_root, "--figure", path) == 0
    picture = np.asarray(Image.open(path))
    assert picture.shape[0] > 800
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 500


def test_classification_figure(fashion_root, tmp_path):
    conftest.trained("train_cls", tmp_path, root=fashion_root)
    assert draw("--checkpoint", tmp_path / "seed0.pt", "--data-root", fashion_root,
                "--figure", tmp_path / "f.png") == 0
    assert (tmp_path / "f.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["module://matplotlib_inline.backend_inline", "typo"])
def test_the_way_that_a_notebook_shows_pictures_is_left_alone(tmp_path, name):
    code = ("import bench_inference, os, sys; from lab import figures; "
            "figures.save(figures.subplots()[0], figures.Path(sys.argv[1], 'figure.png')); "
            "assert 'matplotlib.pyplot' not in sys.modules; "
            f"assert os.environ['MPLBACKEND'] == {name!r}")
    path = os.pathsep.join([str(provenance.SOURCE), str(provenance.SOURCE / "tests")])
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True,
                   env={**os.environ, "MPLBACKEND": name, "PYTHONPATH": path})
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_rows_are_the_best_the_median_and_the_worst(tiny_root):
    dataset = data.load_facades(tiny_root, size=32)
    logits = 9.0 * torch.nn.functional.one_hot(dataset.test.targets.long(), 5).movedim(-1, 1)
    figure = panels.draw_segmentation(dataset, logits, [1.0, 0.4, 1.0], "MAP 50.0 %, WGAP 25.0 %")
    labels = [ax.get_ylabel().split("\n") for ax in figure.axes[::4]]
    pixels = dataset.test.targets.flatten().bincount()
    rarest = pixels.where(pixels > 0, pixels.sum()).argmin()
    assert [label[0].split(":")[0] for label in labels] == [
        "best", "median", f"most {dataset.classes[rarest]}", "worst"]
    assert labels[0][1] == "mean IoU 100 %" and labels[-1][0] == "worst: no. 1"
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "truth", "prediction", "errors"]
    assert figure.get_suptitle() == "mini facade, 3 test images: MAP 50.0 %, WGAP 25.0 %"


def test_figures_of_a_study_are_drawn_from_records_alone(trained, tmp_path, capsys):
    record = json.loads(trained.with_suffix(".json").read_text())
    arrays = dict(np.load(trained.with_suffix(".npz")))
    for row in ("standard", "unet", "my-own"):
        for seed in (0, 1):
            record["config"]["seed"] = seed
            record["metrics"]["test"]["map"] += 0.01 * (seed + len(row)) / 10
            path = tmp_path / f"results/smoke/table2/{row}/seed{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
            np.savez(path.with_suffix(".npz"), **arrays, of=[seed, len(row)])  # no two alike
    draw_study(tmp_path / "results")
    assert {path.name for path in (tmp_path / "results/smoke").glob("*.png")} == {
        "table2.png", "table2-curves.png", "imbalance.png"}
    assert "table1 has no record yet" in capsys.readouterr().out


def test_what_is_measured_on_held_out_training_data_is_not_of_the_test_split(fashion_root,
                                                                             tmp_path):
    conftest.trained("train_cls", tmp_path, "--split", "dev", "--train-images", 256,
                     root=fashion_root)
    assert draw("measure", "--checkpoint", tmp_path / "seed0.pt", "--out", tmp_path / "measured",
                "--images", 8, "--data-root", fashion_root) == 0
    record = json.loads((tmp_path / "measured/seed0.json").read_text())
    assert list(record["metrics"]) == ["val"]
    assert record["config"]["sweep_images"] == 8  # as many as there are


def test_maps_sum_to_the_logits():
    torch.manual_seed(0)
    for down in ("maxpool", "stride", "blurpool"):
        model = models.VGGResNet(width=8, down=down).eval()
        x = torch.randn(4, 1, 56, 56)
        maps = model.activation_maps(model.features(x))
        assert maps.shape == (4, 10, 14, 14)
        assert torch.allclose(maps.sum((2, 3)) + model.classifier.bias, model(x), atol=1e-4)


def test_attention_in_a_cell_by_hand():
    maps = torch.zeros(3, 4, 4)
    # top right, beside 1 of mass bottom left and a negative value that counts for nothing
    maps[0, 0, 3] = 3.0
    maps[0, 2, 0], maps[0, 3, 3] = 1.0, -5.0
    maps[1, 3, 3] = 2.0
    maps[2] = -1.0  # positive nowhere
    share, points = equivariance.attention_in_cell(maps, torch.tensor([1, 1, 0]))
    assert share.tolist() == [0.75, 0.0, 0.0] and points.tolist()[:2] == [True, False]


def test_fourier_shift_is_a_roll_and_between_pixels_exact():
    x = torch.randn(2, 3, 14, 14)
    assert torch.allclose(equivariance.fourier_shift(x, 3, -2), x.roll((3, -2), (2, 3)), atol=1e-5)
    angle = lambda shift: 2 * torch.pi * 3 * (torch.arange(14.0) - shift) / 14
    wave, moved = (torch.cos(angle(shift)).expand(1, 1, 14, 14) for shift in (0, 0.25))
    assert torch.allclose(equivariance.fourier_shift(wave, 0, 0.25), moved, atol=1e-5)


@pytest.mark.parametrize("down", ["maxpool", "stride", "blurpool"])
def test_features_move_exactly_by_whole_strides_once_there_is_no_border(down):
    torch.manual_seed(0)
    model = models.VGGResNet(width=8, down=down).eval()
    x = torch.randn(2, 1, 28, 28)
    bordered, circular = (equivariance.equivariance_error(net, x, 5) for net in
                          (model, equivariance.with_circular_padding(model)))
    assert bordered[0][0] < 1e-5 and bordered[4][4] > 1e-2
    assert max(circular[0][0], circular[0][4], circular[4][4]) < 1e-5 and circular[1][0] > 1e-2


def test_measurements_of_a_surrogate(surrogates, fashion_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)  # what takes long says how far it is, at every step

    def measure(name, seed_folder):
        assert draw("measure", "--checkpoint", surrogates[name], "--out", seed_folder,
                    "--images", 40, "--sweep-images", 2, "--data-root", fashion_root) == 0

    folder = tmp_path / "results/smoke/attention"
    measure("frozen", folder / "frozen-tie0")
    assert "sweep: 50 % of 841 shifts" in capsys.readouterr().err
    measure("scratch", folder / "scratch-tie0.9")
    record = json.loads((folder / "frozen-tie0/seed0.json").read_text())
    scores, arrays = record["metrics"]["test"], np.load(folder / "frozen-tie0/seed0.npz")
    base, trained = files.read_checkpoint(surrogates["base"])["record"], record["trained"]
    assert trained["weights_sha256"] != base["weights_sha256"]
    assert arrays["sweep_accuracy"].shape == (29, 29) and arrays["sweep_consistency"][0, 0] == 1
    assert scores["accuracy"] == (arrays["prediction"] == arrays["target"]).mean()
    # every grid of another class either has the tied digit or has not
    other = arrays["target"] != data.TIED_CLASS
    with_three, without = arrays["trouser_with_three"], arrays["trouser_without_three"]
    taken = (arrays["prediction"] == data.TIED_CLASS) & other
    assert len(with_three) + len(without) == other.sum() and len(with_three) and len(without)
    assert with_three.sum() + without.sum() == taken.sum()
    assert scores["trouser_with_three"] == with_three.mean()
    assert len(arrays["cell1_minus_cell0"]) == 40 and len(arrays["shifted_minus_whole"]) == 2
    gap = scores["accuracy_cell1"] - scores["accuracy_cell0"]
    assert scores["cell1_minus_cell0"] == pytest.approx(gap)
    assert "sweep_accuracy" not in scores
    of_scratch = np.load(folder / "scratch-tie0.9/seed0.npz")
    assert not {"cell1_minus_cell0", "sweep_accuracy"} & set(of_scratch)
    before = (folder / "frozen-tie0/seed0.json").stat().st_mtime_ns
    measure("frozen", folder / "frozen-tie0")
    assert (folder / "frozen-tie0/seed0.json").stat().st_mtime_ns == before  # made once
    for name, images, said in (("scratch", 40, "weights_sha256 "), ("base", 40, "weights_sha256 "),
                               ("frozen", 30, "images 40 there")):
        capsys.readouterr()
        for place in ("frozen-tie0", surrogates["base"].parent):  # a run's own record is another's
            assert draw("measure", "--checkpoint", surrogates[name], "--out", folder / place,
                        "--images", images, "--sweep-images", 2, "--data-root", fashion_root) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2
        assert "frozen-tie0/seed0.json was made with other settings" in errors[0]
        assert said in errors[0] and "choose another --out, or delete " in errors[1]
    assert (folder / "frozen-tie0/seed0.json").stat().st_mtime_ns == before
    for row in ("base", "stride"):
        measure(row, folder.parent / "equivariance" / row)
        assert "equivariance: 50 % of 64 shifts" in capsys.readouterr().err
    draw_study(tmp_path / "results")
    assert {path.name for path in folder.parent.glob("*.png")} == {
        "ties.png", "shifts.png", "confusion.png", "equivariance.png"}
    study.main(["attention", "--protocol", "smoke", "--results", str(tmp_path / "results")])
    text = (folder.parent / "attention.md").read_text()
    assert "`frozen-tie0`" in text and "over all 841 shifts" in text and "| `stride` |" in text


def test_figure1_shows_right_and_wrong_grids_of_both(surrogates, fashion_root, tmp_path):
    assert draw("attention", "--frozen", surrogates["frozen"], "--scratch", surrogates["scratch"],
                "--data-root", fashion_root, "--figure", tmp_path / "figure1.png") == 0
    assert (tmp_path / "figure1.png").stat().st_size > 50_000


def test_figure1_is_of_one_split(surrogates, fashion_root, tmp_path, capsys):
    """Grids and targets of one of them would be held against the other's maps."""
    dev = conftest.trained("train_cls", tmp_path / "dev", "--train-images", 256, "--composites",
                           "--split", "dev", root=fashion_root)
    capsys.readouterr()
    assert draw("attention", "--frozen", surrogates["frozen"], "--scratch", dev / "seed0.pt",
                "--data-root", fashion_root, "--figure", tmp_path / "figure1.png") == 2
    said = capsys.readouterr().err
    assert "--frozen is of split full, --scratch of dev" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "figure1.png").exists()


def test_a_figure_never_replaces_the_photo_that_it_shows(trained, tmp_path, capsys):
    image = Image.fromarray(data.synthetic_facade(0, 96)[0])
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / f"photos/own-{i}.png" for i in range(1, figures.PAGE + 2)]
    for path in paths:
        image.save(path)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    before = [path.read_bytes() for path in paths]
    for figure, given in (("photos/own-3.png", paths[2:3]), ("link/own-3.png", paths[:3]),
                          ("photos/own.png", paths)):  # whose pages are own-1.png and own-2.png
        assert draw("--checkpoint", trained, "--image", *given, "--figure", tmp_path / figure) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "is a file that is read, and would be overwritten; choose another --figure" in said
    assert [path.read_bytes() for path in paths] == before


def test_ones_own_images(surrogates, trained, tmp_path, capsys):
    for i, size in enumerate([(40, 90), (64, 64)]):
        image, _ = data.synthetic_facade(i, 96)
        Image.fromarray(image[:size[0], :size[1]]).save(tmp_path / f"own{i}.png")
    files, own = [tmp_path / f"own{i}.png" for i in range(2)], ("--figure", tmp_path / "own.png")
    for checkpoint in (surrogates["base"], trained):
        assert draw("--checkpoint", checkpoint, "--image", *files, *own) == 0
        assert (tmp_path / "own.png").stat().st_size > 20_000
    assert "others: " in capsys.readouterr().out
    many = [files[i % 2] for i in range(2 * figures.PAGE + 1)]
    assert draw("--checkpoint", trained, "--image", *many, "--figure", tmp_path / "many.png") == 0
    pages = [tmp_path / f"many-{i}.png" for i in (1, 2, 3)]
    assert sorted(tmp_path.glob("many*")) == pages
    assert capsys.readouterr().out.splitlines()[-1] == f"figures {pages[0]} to {pages[-1]}"
    heights = [Image.open(page).height for page in pages]
    assert heights[0] == heights[1] > 8 * heights[2]  # ten images, ten, one
    (tmp_path / "broken.png").write_text("no image")
    assert draw("--checkpoint", trained, "--image", tmp_path / "broken.png") == 2
    assert "broken.png cannot be read as an image" in capsys.readouterr().err
    thin, formula = tmp_path / "thin.png", tmp_path / r"$\frac{$.png"
    Image.new("L", (1, 700)).save(thin)  # stretched to the training size, like any other
    files[0].rename(formula)  # which is none
    for image in (thin, formula):
        assert draw("--checkpoint", trained, "--image", image, *own) == 0


def test_a_large_photo_is_drawn_at_the_size_of_its_panel():
    maps = [np.zeros((3, 4, 4), np.float32)]
    photo = np.zeros((3000, 2000), np.uint8)
    figure = panels.draw_overlays([photo], maps, ["a"], [["b"] * 3], diverging=False)
    drawn = figure.axes[0].get_images()[0]
    assert drawn.get_size() == (512, 341) and drawn.get_extent() == [0, 2000, 3000, 0]


def test_the_architecture_is_read_off_the_modules():
    blocks = interpret.traced(models.HourGlass(1, 2), (3, 32, 32))
    assert [block["kind"] for block in blocks] == [
        "stem", *["down"] * 4, "bottleneck", *["up"] * 4, "1x1 head"]
    assert [block["shape"][0] for block in blocks] == [2, 2, 4, 8, 16, 16, 8, 4, 2, 2, 5]
    assert [block["shape"][1] for block in blocks] == [32, 32, 16, 8, 4, 2, 4, 8, 16, 32, 32]
    assert [block["joins"] for block in blocks] == [None] * 6 + [4, 3, 2, 1] + [None]
    apart = interpret.traced(models.HourGlass(1, 2, inter_skip=False), (3, 32, 32))
    assert not any(block["joins"] for block in apart)


def test_differences_show_ours_and_the_reports(tmp_path):
    def record(value):
        np.savez(tmp_path / f"{value}.npz", accuracy=np.full(9, value))
        return {"config": {}, "metrics": {"test": {"accuracy": value}}, "curve": {"loss": [1.0]},
                "path": str(tmp_path / f"{value}.json")}
    rows = {"maxpool-2-32": {0: record(0.9), 1: record(0.9)},
            "stride-2-32": {0: record(0.88), 1: record(0.89)}, "my-own": {0: record(0.95)}}
    ax = study.draw_table(rows, "table1")["table1.png"].axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stride-2-32", "my-own"]
    drawn = sorted(round(float(line.get_xdata()[0]), 2) for line in ax.lines
                   if line.get_marker() in ("o", "D"))
    assert drawn == [-1.5, -1.15, 5.0]  # ours, the report's, and a row that it does not have


def test_refusals(trained, tiny_root, tmp_path, capsys):
    def message(*flags):
        assert draw(*flags) == 2
        return capsys.readouterr().err.splitlines()[-1]

    nothing, half = tmp_path / "nothing.pt", tmp_path / "half.pt"
    said = message("attention", "--frozen", nothing)
    assert "nothing.pt is not there: `make interpret` trains" in said
    said = message("measure", "--checkpoint", trained, "--out", tmp_path)
    assert "measure takes classifiers" in said
    assert "measure needs --checkpoint" in message("measure", "--checkpoint", trained)
    assert "is no surrogate" in message("attention", "--frozen", trained)
    assert "nothing.pt: No such file" in message("--checkpoint", nothing)
    (tmp_path / "empty").mkdir()
    said = message("--checkpoint", trained, "--data-root", tmp_path / "empty")
    assert "the checkpoint was trained on mini facade" in said
    state = torch.load(trained, weights_only=True)
    del state["record"]
    torch.save(state, half)
    assert "half.pt is of an unfinished run (epoch 2)" in message("--checkpoint", half)
    assert "must end in .png" in message("--checkpoint", trained, "--figure", tmp_path / "a.xyz")


def test_one_command_at_a_time(trained, tmp_path, capsys):
    """Flags of another command are refused, where they were dropped without a word."""
    assert draw("measure", "--checkpoint", trained, "--out", tmp_path, "--image", "x.png") == 2
    assert "unrecognized arguments: --image" in capsys.readouterr().err
    assert draw() == 2
    commands = "predictions, attention, measure, architecture"
    assert f"or a command, one of {commands}" in capsys.readouterr().err


def test_the_architecture_is_drawn(tmp_path):
    argv = ["architecture", "--figure", str(tmp_path / "a.png")]
    assert cli.guard(lambda: interpret.main(argv)) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_surrogates_are_found_by_what_they_are_not_by_their_folders_name():
    of = lambda frozen, tie: {0: {"config": {"frozen": frozen, "tie": tie, "seed": 0}}}
    rows = {"mine": of(True, 0.0), "another": of(False, 0.9)}
    assert study.surrogates(rows) == {("frozen", 0.0): rows["mine"],
                                      ("scratch", 0.9): rows["another"]}
    for name in ("frozen-tie0", "frozen-tie0-wide"):  # a row that a reader adds is no other's
        rows[name] = of(True, 0.0)
    assert study.surrogates(rows)["frozen", 0.0] is rows["frozen-tie0"]
