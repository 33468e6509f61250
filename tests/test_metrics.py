"""The record of a run: the cut at a restart, full precision, TensorBoard events, the picture, the progress line."""

import contextlib
import io
import json
import math
import re
import struct
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import rich.console

from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.runs import metrics_log
from ifm_jax.runs.curves import _running_mean, draw_curves
from ifm_jax.runs.metrics_log import FIELDS, MetricsLog
from ifm_jax.runs.progress import Progress, Silence
from ifm_jax.runs.tensorboard import TensorBoardLog


def make_record(step, **extras):
    return {
        "step": step,
        "epoch": step / 32,
        "loss": 6.0 / step + 0.1,
        "loss_clean": 6.0 / step,
        "loss_ifm": 6.0 / step + 0.2,
        "acc1": 40.0 + step % 7,
        "acc5": 60.0 + step % 7,
        "lr": 0.03 / step,
        "grad_norm": 1 / 3,
        "images_per_sec": 2310.4,
        "data_wait": 0.02,
        **extras,
    }


def write_lines(path, steps):
    """Writes a file by hand, with spacing the log itself would not use, so that rewritten lines would be noticed."""
    lines = [json.dumps(make_record(step), indent=None, separators=(",", " : ")).encode() + b"\n" for step in steps]
    path.write_bytes(b"".join(lines))
    return lines


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_log_starts_a_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, last_step=0) as log:
        assert metrics_log.read(path) == []
        log.write(make_record(1))
        assert metrics_log.read(path) == [make_record(1)]  # there at once, not when the file is closed
        log.write(make_record(2))
    assert metrics_log.read(path) == [make_record(1), make_record(2)]


@pytest.mark.parametrize("last_step", [0, 10, 25, 50, 99])
def test_resume_drops_later_steps_and_keeps_lines_byte_for_byte(tmp_path, last_step):
    path = tmp_path / "metrics.jsonl"
    lines = write_lines(path, [10, 20, 30, 40, 50])
    with MetricsLog(path, last_step):
        kept = b"".join(lines[: last_step // 10])
        assert path.read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_log_equals_uninterrupted_one(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    with MetricsLog(whole, 0) as log:
        for step in range(1, 11):
            log.write(make_record(step))
    with MetricsLog(resumed, 0) as log:
        for step in range(1, 8):
            log.write(make_record(step))
    with MetricsLog(resumed, 4) as log:
        for step in range(5, 11):
            log.write(make_record(step))
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("tail", [b'{"step": 30, "loss": 1.', b'{"step": 3', b"{", b"\x00\x00\x00", b'{"step": 30,\n'])
def test_half_written_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    lines = write_lines(path, [10, 20])
    path.write_bytes(b"".join(lines) + tail)
    assert [record["step"] for record in metrics_log.read(path)] == [10, 20]
    with MetricsLog(path, last_step=99) as log:
        assert path.read_bytes() == b"".join(lines)
        log.write(make_record(30))
    assert [record["step"] for record in metrics_log.read(path)] == [10, 20, 30]


def test_last_record_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = write_lines(path, [10, 20])
    path.write_bytes(b"".join(lines)[:-1])
    with MetricsLog(path, last_step=20):
        assert path.read_bytes() == b"".join(lines)


def test_file_is_not_rewritten_without_need(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [10, 20])
    before = path.stat()
    with MetricsLog(path, last_step=20):
        pass
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_cut_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = write_lines(path, [10, 20, 30])

    def fail(*args):
        raise OSError("killed here")

    monkeypatch.setattr(metrics_log.os, "replace", fail)
    with pytest.raises(OSError, match="killed here"):
        MetricsLog(path, last_step=10)
    assert path.read_bytes() == b"".join(lines)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    with MetricsLog(path, last_step=5) as log:
        log.write(make_record(6))
    assert metrics_log.read(path) == [make_record(6)]


def test_missing_file(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", last_step=5) as log:
        log.write(make_record(6))
    assert metrics_log.read(tmp_path / "metrics.jsonl") == [make_record(6)]
    with pytest.raises(FileNotFoundError, match=r"other\.jsonl"):
        metrics_log.read(tmp_path / "other.jsonl")


@pytest.mark.parametrize("line", [b"{broken", b"[1, 2]", b'{"loss": 1.0}', b'{"step": 15, "loss": NaN}', b""])
def test_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    lines = write_lines(path, [10, 20])
    content = lines[0] + line + b"\n" + lines[1]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object .* delete that line"):
        metrics_log.read(path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsLog(path, last_step=20)
    assert path.read_bytes() == content


def test_field_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = make_record(1, zebra=1.0, apple=2)
    shuffled = dict(reversed(record.items()))
    with MetricsLog(path) as log:
        log.write(shuffled)
        log.write({"lr": 0.1, "step": 2})
    first, second = metrics_log.read(path)
    assert tuple(first)[: len(FIELDS)] == FIELDS
    assert list(first)[len(FIELDS) :] == ["apple", "zebra"]  # as they came
    assert list(second) == ["step", "lr"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array(math.inf)])
@pytest.mark.parametrize("name", ["loss", "extra"])
def test_non_finite_number_is_refused(tmp_path, name, value):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(make_record(1))
        with pytest.raises(ValueError, match=f"{name} is (nan|-?inf) at step 2"):
            log.write(make_record(2) | {name: value})
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.write(make_record(2, nested=[math.nan]))
        log.write(make_record(3))
    assert [record["step"] for record in metrics_log.read(path)] == [1, 3]


def test_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [10, 20])
    with MetricsLog(path, last_step=20) as log:
        for step in (20, 5, None, 21.0):
            with pytest.raises(ValueError, match=f"step {step} cannot follow step 20"):
                log.write(make_record(1) | {"step": step})
        log.write(make_record(21))
        with pytest.raises(ValueError, match="step 21 cannot follow step 21"):
            log.write(make_record(21))


def test_floats_keep_full_precision(tmp_path):
    path = tmp_path / "metrics.jsonl"
    numbers = np.random.default_rng(0).standard_normal(200) * 10.0 ** np.arange(-100, 100)
    with MetricsLog(path) as log:
        log.write({"step": 1} | {f"x{i}": float(x) for i, x in enumerate(numbers)})
        log.write({"step": np.int32(2), "loss": np.float32(0.1), "lr": np.float64(0.1), "acc1": np.array(1 / 3)})
    first, second = metrics_log.read(path)
    assert [first[f"x{i}"] for i in range(200)] == numbers.tolist()
    assert second == {"step": 2, "loss": float(np.float32(0.1)), "acc1": 1 / 3, "lr": 0.1}
    assert f'"acc1": {1 / 3!r}' in path.read_text()


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def read_events(path):
    """Reads an event file: TFRecord framing (length, its checksum, data, its checksum) around protocol buffers."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    data, events = path.read_bytes(), []
    while data:
        (length,), (length_crc,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        payload, (payload_crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert length_crc == masked_crc32c(data[:8])
        assert payload_crc == masked_crc32c(payload)
        events.append(event_pb2.Event.FromString(payload))
        data = data[16 + length :]
    return events


def test_tensorboard_scalars_read_back(tmp_path):
    directory = tmp_path / "run" / "tensorboard"
    with TensorBoardLog(directory) as log:
        for step in (10, 20):
            log.write(step, make_record(step, **{"probe/shape": np.float32(71.5), "note": "text"}))
    log.close()
    (path,) = directory.iterdir()
    version, start, *events = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert start.step == 1
    assert [event.step for event in events] == [10, 20]
    for event in events:
        values = {value.tag: value.simple_value for value in event.summary.value}
        record = make_record(event.step)
        expected = {f"train/{name}": record[name] for name in FIELDS if name not in ("step", "epoch")}
        assert values == pytest.approx(expected | {"probe/shape": 71.5}, rel=1e-6)
        assert abs(event.wall_time - time.time()) < 60


def test_tensorboard_resume_purges_and_keeps_the_earlier_file(tmp_path):
    for last_step, steps in ((0, (10, 20, 30)), (20, (30, 40)), (20, (30,))):  # restarts within one second
        with TensorBoardLog(tmp_path, last_step) as log:
            for step in steps:
                log.write(step, make_record(step))
    paths = sorted(tmp_path.iterdir(), key=lambda path: int(path.suffix[1:]))
    assert len(paths) == 3
    starts, steps = [], []
    for path in paths:
        _, start, *events = read_events(path)
        assert start.session_log.status == start.session_log.START
        starts.append(start.step)
        steps.append([event.step for event in events])
    assert starts == [1, 21, 21]  # TensorBoard forgets what it read of these steps and later ones
    assert steps == [[10, 20, 30], [30, 40], [30]]


def test_groups_of_the_names():
    record = {
        "step": 3,
        "epoch": 0.5,
        "loss": 1.0,
        "lr": np.float32(0.5),
        "knn": 60.0,
        "gain/a b": 2.0,
        "erased": ["x"],
    }
    assert metrics_log.grouped(record | {"effective_rank": 7}) == {
        "train/loss": 1.0,
        "train/lr": 0.5,
        "eval/knn": 60.0,
        "eval/gain/a b": 2.0,
        "diagnostics/effective_rank": 7,
    }
    probe = {"step": 3, "loss": 1.0, "val_acc1/shape": 9.0, "heads": {}}
    assert metrics_log.grouped(probe, "probe") == {"probe/loss": 1.0, "probe/val_acc1/shape": 9.0}


def test_tensorboard_has_the_config_and_pictures(tmp_path):
    from tensorboardX.proto import plugin_hparams_pb2

    config, picture = Config(), tmp_path / "curves.png"
    draw_curves([make_record(10)], picture)
    with TensorBoardLog(tmp_path / "events", None) as log:
        log.write_config(0, config, ("train/loss",))
        log.write_picture(5, "train/curves", picture)
    (path,) = (tmp_path / "events").iterdir()
    _, text, *hyperparameters, image = read_events(path)  # without a session that starts
    (value,) = text.summary.value
    assert value.metadata.plugin_data.plugin_name == "text"
    assert configs.from_json(value.tensor.string_val[0].decode().strip("`json\n")) == config
    of_plugin = [plugin_hparams_pb2.HParamsPluginData() for _ in hyperparameters]
    for found, event in zip(of_plugin, hyperparameters, strict=True):
        found.ParseFromString(event.summary.value[0].metadata.plugin_data.content)
    assert [each.name.tag for each in of_plugin[0].experiment.metric_infos] == ["train/loss"]
    given = of_plugin[1].session_start_info.hparams
    assert set(given) == set(configs.flatten(configs.to_dict(config)))
    assert given["optim.lr"].number_value == config.optim.lr
    assert given["moco.mlp"].bool_value
    assert given["linear.lr"].string_value == "[10.0]"
    assert given["ifm.epsilon_negative"].string_value == "none"
    (value,) = image.summary.value
    assert (image.step, value.tag, value.image.width, value.image.height) == (5, "train/curves", 1080, 1080)
    assert value.image.encoded_image_string == picture.read_bytes()


def test_tensorboard_flushes_as_it_goes(tmp_path):
    with TensorBoardLog(tmp_path, flush_every=0.0) as log:
        log.write(10, make_record(10))
        (path,) = tmp_path.iterdir()
        assert read_events(path)[-1].step == 10


def test_imports_are_light(tmp_path):
    """Neither the module nor its TensorBoard log loads torch or TensorFlow; torch can be imported afterwards."""
    code = (
        "import sys; from ifm_jax.runs import curves, metrics_log, progress, tensorboard\n"
        "heavy = {'matplotlib', 'tensorboardX', 'torch', 'tensorflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"tensorboard.TensorBoardLog({str(tmp_path)!r}).close()\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- curves.png ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_curves(tmp_path, count):
    path = tmp_path / "curves.png"
    path.write_bytes(b"an older picture")
    records = [make_record(10 * (i + 1)) for i in range(count)]
    draw_curves(records, path)
    began = time.process_time()
    draw_curves(records, path)
    assert time.process_time() - began < 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (1080, 1080, 3)
    for top, bottom in ((70, 430), (450, 810), (840, 1015)):  # each of the three panels has a colored or dark curve
        panel = image[top:bottom, 110:1050]
        assert ((panel.max(axis=-1) - panel.min(axis=-1) > 0.3) | (panel.max(axis=-1) < 0.4)).sum() > 20


def test_curves_without_some_fields(tmp_path):
    path = tmp_path / "curves.png"
    draw_curves([{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5, "lr": 0.0, "acc1": None}], path)
    assert matplotlib.image.imread(path).shape[:2] == (1080, 1080)


def evaluated(step, *labels, **extras):
    """A record with what an evaluation finds for these labels; for none, as for a source with a single one."""
    values = {"linear": 60.0, "knn": 55.0, "gain": 20.0, "knn_gain": 10.0}
    each = {f"{name}/{label}": value - 5 * i for name, value in values.items() for i, label in enumerate(labels)}
    return make_record(step, **values, **each, **extras)


@pytest.mark.parametrize("labels", [(), ("shape", "texture", "color"), tuple(f"attribute{i}" * 4 for i in range(40))])
def test_curves_of_evaluations(tmp_path, labels):
    """A panel for the readouts, with its legend above it; a color for each label, six at most."""
    path = tmp_path / "curves.png"
    draw_curves([evaluated(step, *labels) if step % 4 == 0 else make_record(step) for step in range(1, 13)], path)
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (1440, 1080, 3)
    rows = {}
    for color in ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"):
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        place = (np.abs(image - wanted).max(axis=-1) < 0.02)[690:1200]
        rows[color] = np.flatnonzero(place.any(axis=1)) + 690
    assert [len(found) > 0 for found in rows.values()] == [i < max(len(labels), 1) for i in range(5)]
    # A white row parts the legend from the panel.
    assert (image[790:830, 110:1050] == 1).all(axis=(1, 2)).any() or len(labels) > 3


def test_no_records_no_picture(tmp_path):
    draw_curves([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_running_mean():
    noise = np.random.default_rng(0).standard_normal(1000)
    line = np.arange(1000.0)
    np.testing.assert_allclose(_running_mean(line, 20)[5:-5], line[5:-5])  # a slope stays what it is
    assert _running_mean(noise, 20).std() < 0.3
    gaps = np.where(line % 2 == 0, 3.0, math.nan)
    np.testing.assert_allclose(_running_mean(gaps, 20), 3.0)


# --- progress --------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines():
    output, clock = io.StringIO(), Clock()
    with Progress(256, epochs=8, file=output, clock=clock) as progress:
        progress.message("compiling the training step")
        clock.now = 100.0  # what compilation takes
        for step in range(1, 257):
            record = make_record(step, loss=3.21009, acc1=41.21, lr=0.018) if step in (120, 256) else None
            progress.update(step, record)
            clock.now += 0.5
    assert output.getvalue().splitlines() == [
        "compiling the training step",
        "step 120/256  epoch 3.75/8  loss 3.2101  acc1 41.2 %  lr 0.0180  2310 images/s  left 0:01:08",
        "step 256/256  epoch 8.00/8  loss 3.2101  acc1 41.2 %  lr 0.0180  2310 images/s  left 0:00:00",
    ]


def test_plain_lines_show_gains_where_there_was_an_evaluation():
    output = io.StringIO()
    with Progress(100, epochs=1, verbose=True, file=output, clock=Clock()) as progress:
        progress.update(10, evaluated(10, "shape", "texture", "color"))
        progress.update(20, make_record(20))
        progress.update(30, evaluated(30))
        progress.update(40, evaluated(40, *"abcde"))
    gains = [re.search(r"acc1 .* %  (.*)lr", line)[1] for line in output.getvalue().splitlines()]
    assert gains == ["gain shape +20.0, texture +15.0, color +10.0  ", "", "gain +20.0  ", "gain +20.0, least e +0.0  "]


def test_the_bar_keeps_the_gains(terminal):
    console, clock = terminal(160), Clock()
    with Progress(100, epochs=1, console=console, clock=clock) as progress:
        for step in (10, 20):
            clock.now += 30.0
            progress.update(step, evaluated(step, "shape", "color") if step == 10 else make_record(step))
            progress._live.refresh()
    for number in (10, 20):
        line = next(line for line in shown_lines(console) if f" {number}/100" in line)
        assert "gain shape +20.0, color +15.0" in line


def test_plain_line_before_the_speed_is_known():
    output = io.StringIO()
    with Progress(1000, epochs=8, steps_per_epoch=400, file=output, clock=Clock()) as progress:
        progress.update(1, {"step": 1, "lr": 3e-5, "images_per_sec": 1.234})
    assert output.getvalue() == "step 1/1000  epoch 0.00/8  lr 3.0e-05  1.23 images/s\n"


def test_time_left_follows_recent_speed():
    output, clock = io.StringIO(), Clock()
    with Progress(10_000, epochs=1, start_step=1000, file=output, clock=clock) as progress:
        for step in range(1001, 2001):  # 1 s a step
            clock.now += 1.0
            progress.update(step)
        for step in range(2001, 3001):  # then ten times as fast
            clock.now += 0.1
            progress.update(step, {"step": step} if step == 3000 else None)
    assert output.getvalue().endswith("left 0:11:40\n")  # 7000 steps of 0.1 s


def test_update_is_cheap():
    with Progress(10**6, epochs=8, file=io.StringIO()) as progress:
        began = time.process_time()
        for step in range(1, 10_001):
            progress.update(step)
        assert time.process_time() - began < 0.2


def test_silence(capsys):
    with Silence() as progress:
        progress.message("hello")
        progress.update(1)
        progress.update(2, make_record(2))
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def terminal(monkeypatch):
    """Makes a terminal of a given width that keeps what it is sent."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLUMNS", raising=False)

    def make(width):
        return rich.console.Console(file=io.StringIO(), force_terminal=True, width=width, height=24)

    return make


def shown_lines(console):
    """Returns every line that was on the terminal at any time."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    return [line for line in re.split(r"[\r\n]", text) if line]


@pytest.mark.parametrize(("total", "epochs"), [(256, 8), (1_000_000, 200)])
@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 160])
def test_bar_fits_the_terminal(terminal, width, total, epochs):
    console, clock = terminal(width), Clock()
    with Progress(total, epochs=epochs, console=console, clock=clock) as progress:
        progress.message("compiling")
        for step in (1, total // 2, total):
            clock.now += 30.0
            progress.update(step, make_record(step, epoch=step / total * epochs, loss=3.2101))
            progress._live.refresh()
    lines = shown_lines(console)
    assert "compiling" in lines
    bars = [line for line in lines if line.startswith("epoch ")]
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in bars)
    half = next(line for line in bars if f"{total // 2}/{total}" in line)
    assert f"epoch {epochs // 2:>{len(str(epochs))}}/{epochs}" in half
    if width >= 80:
        assert "first step to come" in bars[0]
        assert re.search(r"━ .*loss 3\.2101  acc1 .* %  .*left 0:00:30$", half.rstrip())
        assert f"{total}/{total}" in bars[-1]
        assert "done in 0:01:30" in bars[-1]
    if width >= 160:
        assert re.search(r"lr .*  2310 images/s  0:01:00  left", half)


def test_what_is_printed_under_the_bar_stays(terminal):
    console = terminal(80)
    with contextlib.redirect_stdout(console.file), Progress(10, epochs=1, console=console) as progress:
        print("from elsewhere")
        progress.message("[bold]brackets are text[/bold]")
    lines = shown_lines(console)
    assert "from elsewhere" in lines
    assert "[bold]brackets are text[/bold]" in lines
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back


def test_bar_leaves_cleanly_on_an_error(terminal):
    console, stdout = terminal(80), sys.stdout
    with pytest.raises(KeyboardInterrupt), Progress(10, epochs=1, console=console):
        raise KeyboardInterrupt
    assert sys.stdout is stdout
    assert console.file.getvalue().endswith("\x1b[?25h")


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "dumb")
    output = Tty()
    with Progress(10, epochs=1, file=output) as progress:
        progress.update(5, {"step": 5, "loss": 1.0})
    assert output.getvalue() == "step 5/10  epoch 0.50/1  loss 1.0000\n"
