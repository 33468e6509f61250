"""What a run says: its first line, a line an epoch, what an evaluation found, its last lines; and when it refuses."""

import io
import re
import signal

import pytest
import rich.console

from ifm_jax.errors import UsageError
from ifm_jax.runs import metrics_log, summary, training
from ifm_jax.runs.loop import Outcome
from ifm_jax.runs.progress import Progress
from tests import small


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self):
        return self.now


def steps_printed(total, epochs, *, log_every, seconds=0.1, **options):
    """Returns the steps that get a plain line."""
    output, clock = io.StringIO(), Clock()
    with Progress(total, epochs=epochs, file=output, clock=clock, **options) as progress:
        for step in range(1, total + 1):
            clock.now += seconds
            progress.update(step, {"step": step} if step % log_every == 0 or step == total else None)
    return [int(line.split()[1].partition("/")[0]) for line in output.getvalue().splitlines()]


def test_a_log_file_gets_a_line_an_epoch():
    assert steps_printed(60, 6, log_every=2) == [2, 10, 20, 30, 40, 50, 60]
    # Where the ends of epochs are not logged: the first line after each.
    assert steps_printed(32, 4, log_every=3) == [3, 9, 18, 24, 32]
    assert steps_printed(60, 6, log_every=2, verbose=True) == list(range(2, 61, 2))
    # A run that goes on, and one that ends within its recipe's epoch.
    assert steps_printed(25, 6, log_every=5, steps_per_epoch=10) == [5, 10, 20, 25]
    # Long epochs: a line every ten minutes.
    assert steps_printed(100, 1, log_every=1, seconds=60.0) == [*range(1, 100, 10), 100]


def test_what_an_evaluation_found_is_in_its_line_and_stays_in_the_bar(monkeypatch):
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "knn": 81.25, "linear": 90.0},
        {"step": 3, "loss": 1.0},
    ]
    output = io.StringIO()
    with Progress(3, epochs=3, file=output, clock=Clock()) as progress:
        for record in records:
            progress.update(record["step"], record)
    assert output.getvalue().splitlines() == [
        "step 1/3  epoch 1.00/3  loss 2.0000",
        "step 2/3  epoch 2.00/3  loss 1.0000  knn 81.2 %  linear 90.0 %",
        "step 3/3  epoch 3.00/3  loss 1.0000  left 0:00:00",
    ]

    monkeypatch.setenv("TERM", "xterm-256color")
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100, height=24)
    with Progress(4, epochs=4, console=console, clock=Clock()) as progress:
        for record in records:
            progress.update(record["step"], record)
        progress._live.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "knn 81.2 %  linear 90.0 %" in [line for line in re.split(r"[\r\n]", text) if "3/4" in line][-1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "mine: IFM (eps 0.1), T = 0.2, K = 64; 50 images of trifeature at 32 px; workdir a b"),
        ({"ifm__objective": "infonce", "moco__temperature": 0.07}, "mine: MoCo, T = 0.07, K = 64; 50 images of "),
        (
            {"method": "simclr", "hard__beta": 1.0},
            "mine: IFM (eps 0.1) on SimCLR, beta 1, T = 0.5, negatives from the batch of 16; 50 images of trifeature",
        ),
        ({"data__source": "folder:/x", "moco__queue_size": 65536}, "K = 65,536; 50 images of folder:/x at 32 px"),
    ],
)
def test_the_first_line_of_a_run(fields, said):
    assert said in summary.introduction(small.config(**fields), 50, "a b", "mine")


def test_the_last_lines_of_a_run():
    done, following = summary.conclusion(Outcome(8, 8), "a b", labels=True)
    files = "metrics.jsonl, curves.png, samples.png and tensorboard/."
    assert done == f"Done. a b has the checkpoint of step 8 (checkpoints/), {files}"
    assert following.startswith("Next: ifm-jax eval --workdir='a b' --fast   (")
    assert "--neighbors=" in summary.conclusion(Outcome(8, 8), "a", labels=False)[1]


@pytest.mark.slow
def test_a_run_refuses_a_queue_of_more_keys_than_images(tmp_path, capsys):
    """A new one: a run that has begun goes on, and so does one that accepts it."""
    config = small.config(moco__queue_size=96, steps=2)
    message = (
        r"moco.queue_size=96 is more than the 64 images, .*: use 64 or less \(ifm-jax config --suggest --images=64\)"
    )
    with small.light():
        with pytest.raises(UsageError, match=message):
            training.train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        config.moco.queue_beyond_images = True
        training.train(config, tmp_path / "run", recipe="mine")
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith("mine: IFM (eps 0.1), T = 0.2, K = 96; 64 images of trifeature at 32 px; workdir ")
        assert any(line.startswith("Warning: the queue holds 96 keys, more than the 64 images") for line in out)
        assert out[-2].startswith("Done. ")
        assert out[-1].startswith(f"Next: ifm-jax eval --workdir={tmp_path}/run --fast")
        config.moco.queue_beyond_images, config.steps = False, 3
        training.train(config, tmp_path / "run", quiet=True)
    assert [record["step"] for record in metrics_log.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_stopped_run_does_not_say_that_it_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(summary, "conclusion", lambda *_, **__: 1 / 0)
    stopped = Outcome(1, 8, signal.SIGINT)
    monkeypatch.setattr("ifm_jax.runs.session.Session.run", lambda *_, **__: (stopped, None))
    with small.light():
        assert training.train(small.config(), tmp_path) is stopped
