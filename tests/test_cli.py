"""The command line as a user meets it: real processes, their output, exit codes and files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def bnkit(*arguments, cwd=None, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "bnkit", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, **options,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Two classes of 20 small pictures."""
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def assert_one_line_error(done, *words):
    """Exit code 2, one line, no traceback, nothing on standard output."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_quick_comparison_prints_the_answer_and_writes_the_files(tmp_path):
    done = bnkit("compare", "--quick", "--steps", 300, "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "At one learning rate (rate 0.5, initial std 0.01), the network with BN" in done.stdout
    (out,) = (tmp_path / "runs").iterdir()
    names = {"report.html", "metrics.csv", "run.json", "accuracy.svg", "activations.svg"}
    assert {path.name for path in out.iterdir()} == names
    run = json.loads((out / "run.json").read_text())
    assert run["command"] == "bnkit compare --quick --steps 300 --threads 1"
    assert run["environment"]["threads"] == 1
    assert run["environment"]["allocator"] in ("tuned", "default")
    without, with_bn = run["networks"]
    assert with_bn["best_accuracy"][0] > 0.8 > without["best_accuracy"][0]


def test_report_renders_in_a_browser(tmp_path):
    from report.browser import check_page

    done = bnkit("compare", "--steps", 40, "--grid-steps", 10, "--seeds", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check_page(tmp_path / "out" / "report.html")


def test_json_is_all_of_standard_output(tmp_path):
    done = bnkit("compare", "--quick", "--steps", 5, "--out", tmp_path, "--json", "--norms", "batch", "--lr", 0.25)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["config"]["learning_rate"] == 0.25
    assert [net["norm"] for net in run["networks"]] == ["batch"]
    assert run == json.loads((tmp_path / "run.json").read_text())
    assert "training: 5 steps" in done.stderr


@pytest.mark.parametrize("model", ["lenet5", "vgg11"])
def test_convolutional_nets_on_a_folder_of_pictures(tmp_path, folder, model):
    done = bnkit(
        "compare", "--model", model, "--data", folder, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "out",
        "--norms", "none,batch,group",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "group norm" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--model", "lenet"], ["unknown model 'lenet'", "lenet5"]),
    (["--model", "bnkit:lenet"], ["unknown model 'lenet'", "lenet5"]),
    (["--model", "torchvision:vgg11"], ["compare exchanges norms", "got 'torchvision:vgg11'", "bnkit models"]),
    (["--model", "net.py:made"], ["compare exchanges norms", "got 'net.py:made'", "bnkit models"]),
    (["--norms", "none,bacth"], ["unknown norm 'bacth'", "batch"]),
    (["--data", "minst"], ["unknown data set 'minst'", "mnist"]),
    (["--batch-size", "1"], ["more than one image a batch", "--batch-size 2"]),
    (["--data", "cifar10"], ["cifar10", "--download"]),
    (["--threads", "0"], ["--threads must be at least 1, got 0"]),
    (["--device", "tpu"], ["unknown device 'tpu'", "cpu"]),
])  # fmt: skip
def test_mistakes_are_one_line_with_the_remedy(tmp_path, arguments, words):
    assert_one_line_error(bnkit("compare", "--steps", 5, *arguments, cwd=tmp_path), *words)


def test_a_folder_with_one_class(tmp_path, folder):
    shutil.rmtree(folder / "dark")
    assert_one_line_error(bnkit("compare", "--data", folder, "--model", "lenet5", cwd=tmp_path), "one class", "light")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(bnkit("compare", "--data", tmp_path / "empty", cwd=tmp_path), "empty")


def test_a_corrupt_image_is_named_and_can_be_skipped(tmp_path, folder):
    (folder / "dark" / "7.png").write_bytes(b"not a picture")
    settings = [
        "compare",
        "--data",
        folder,
        "--model",
        "lenet5",
        "--steps",
        2,
        "--batch-size",
        4,
        "--out",
        tmp_path / "o",
    ]
    assert_one_line_error(bnkit(*settings), "7.png", "--skip-corrupt")
    done = bnkit(*settings, "--skip-corrupt")
    assert done.returncode == 0, done.stderr
    assert "1 image could not be read" in done.stdout


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line_error(bnkit("compare", "--steps", 5, "--out", tmp_path / "file"), "can't write", "choose another")


def test_divergence_stops_one_network_and_says_so(tmp_path, folder):
    done = bnkit(
        "compare", "--data", folder, "--model", "lenet5", "--lr", 300, "--steps", 8, "--batch-size", 4,
        "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "without BN, seed 0: stopped at step" in done.stdout
    assert "at rate 300" in done.stdout


def heed_interrupts():
    """A job that a shell put into the background ignores Ctrl-C, and its children do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments, out):
    return subprocess.Popen(
        [sys.executable, "-m", "bnkit", "compare", *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )


def wait_for_training(process):
    assert any(line.startswith("training") for line in process.stdout), process.stderr.read()


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    process = start("--quick", "--steps", "10000000", out=tmp_path / "out")
    wait_for_training(process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert "interrupted after" in stdout
    assert "interrupted after" in json.loads((tmp_path / "out" / "run.json").read_text())["partial"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_killed_run_leaves_no_half_written_file(tmp_path):
    process = start("--quick", "--steps", "10000000", out=tmp_path / "out")
    wait_for_training(process)
    process.kill()
    process.communicate()
    assert list((tmp_path / "out").iterdir()) == []


def test_help_names_every_option():
    text = bnkit("compare", "--help").stdout
    for option in (
        "--steps", "--lr", "--batch-size", "--norms", "--model", "--data", "--data-dir", "--download", "--skip-corrupt",
        "--seed", "--seeds", "--quick", "--out", "--threads", "--device", "--json",
    ):  # fmt: skip
        assert option in text


def test_bad_use_exits_with_2():
    assert bnkit("compare", "--step", 3).returncode == 2
    assert bnkit("compair").returncode == 2
