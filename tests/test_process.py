"""How processes begin and end: streams that are closed or full, signals, Ctrl-C while importing, the supervisor."""

import codecs
import io
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ifm_jax import process
from ifm_jax.cli import command, train
from ifm_jax.runs import loop
from ifm_jax.runs.progress import Progress, Silence

ROOT = pathlib.Path(__file__).resolve().parent.parent


def python(code, *arguments, **options):
    """Starts Python with a piece of code, in which the package can be imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command_line, env=environment, **pipes | options)


# ----------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.fixture
def run(monkeypatch):
    """Runs a `main` as a script does, with this stdout: the exit status."""
    monkeypatch.setattr(process, "keep_memory", lambda: None)
    monkeypatch.setattr(command, "_workdir", None)

    def run_(main, stdout=None):
        if stdout is not None:
            monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            command.run(main, train.flags(), ["train.py", "--workdir=x y"])
        return ended.value.code

    return run_


@pytest.fixture
def closed_pipe():
    """A text stream whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


def test_another_kind_of_standard_output_is_left_as_it_is(monkeypatch):
    """One that is strict about letters, and cannot be told otherwise."""
    stream = codecs.getwriter("ascii")(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stream)
    process.prepare_streams()
    assert sys.stdout is stream


def test_closed_streams_lead_nowhere_and_no_letter_is_refused(tmp_path):
    """Not into the next file that is opened."""
    code = f"""
        import os, sys
        from ifm_jax import process
        process.prepare_streams()
        with open({str(tmp_path / "file")!r}, "w") as file:
            file.write("written")
            print("lost", flush=True)
            print("lost", file=sys.stderr, flush=True)
            os.write(1, b"lost")
    """
    for closed in (">&-", "2>&-", ">&- 2>&- <&-"):
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(shell, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, (closed, done.stderr)
        assert (tmp_path / "file").read_text() == "written"
    code = "from ifm_jax import process; process.prepare_streams(); print('l\\u00e4ufe \\u2500 \\udcff')"
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(b"l\\xe4ufe" if encoding == "ascii" else "läufe ─ ".encode())


def test_a_reader_that_has_left_ends_a_command_with_the_status_of_sigpipe(run, closed_pipe, capsys):
    done = []

    def main(_):
        print("a line", flush=True)
        done.append(True)

    assert run(main, closed_pipe) == 141
    assert not done  # nobody would read the rest
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workdir", [None, "run"])
def test_a_full_disk_under_stdout_ends_nothing_and_fails_only_what_has_no_workdir(run, tmp_path, capsys, workdir):
    done = []

    def main(_):
        if workdir:
            command.workdir(tmp_path / workdir)
        for _ in range(3):
            print("x" * 10_000, flush=True)
        done.append(True)

    with open("/dev/full", "w") as full:
        assert run(main, full) == (0 if workdir else 1)
    assert done
    said = capsys.readouterr().err
    assert (
        said == "train.py: cannot write to standard output (No space left on device): the rest of the output is lost\n"
    )


def test_a_loop_whose_output_is_closed_stops_as_for_a_signal(closed_pipe):
    with Progress(10, epochs=1, file=closed_pipe) as progress, loop.StopSignals(progress) as stop:
        stop.check()
        assert stop.signal is None
        progress.update(1, {"loss": 1.0})
        progress.message("no error")
        stop.check()
    assert stop.signal == signal.SIGPIPE
    os.dup2(os.open(os.devnull, os.O_WRONLY), closed_pipe.fileno())  # what it still holds


# ----------------------------------------------------------------------------------------------------------------------
# What nobody has foreseen


def test_what_nobody_has_foreseen_is_one_line_and_its_traceback_a_file(run, tmp_path, capsys, monkeypatch):
    def fail():
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise ZeroDivisionError("the\nfirst line counts") from error

    def main(_):
        command.workdir(tmp_path)
        fail()

    assert run(main) == 1
    said = capsys.readouterr().err
    (path,) = tmp_path.glob("crash-*.txt")
    assert said == f"train.py: unexpected ZeroDivisionError: the; the traceback is in {path}\n"
    text = path.read_text()
    for part in ("KeyError: 'the cause'", "in fail", "direct cause", "ZeroDivisionError", "'--workdir=x y'", "jax "):
        assert part in text
    path.unlink()

    # A workdir that is not there (yet): the temporary directory.
    def elsewhere(_):
        command.workdir(tmp_path / "none")
        fail()

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(elsewhere) == 1
    (path,) = tmp_path.glob("crash-*.txt")
    assert f"the traceback is in {path}" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.fixture
def handlers():
    """The signals' handlers, put back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Lines(Silence):
    """Takes down what is said."""

    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_said_by_the_loop_and_the_second_acts(handlers, monkeypatch, number):
    acted, progress = [], Lines()
    signal.signal(number, lambda *_: acted.append(number))
    with loop.StopSignals(progress) as stop:
        signal.raise_signal(number)
        assert (stop.signal, progress.lines) == (number, [])  # nothing is printed in the middle of anything
        signal.raise_signal(number)  # at once: the same, sent to the process and to its group
        for _ in range(2):
            stop.check()
        assert progress.lines == [f"{number.name}: saving after this step (a second signal stops at once)."]
        assert acted == []
        monkeypatch.setattr(loop, "_SAME_SIGNAL", -1.0)
        signal.raise_signal(number)
        assert acted == [number]


def test_nohup_is_obeyed_and_another_hosts_signal_is_no_first_one(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with loop.StopSignals(Lines()) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None
        stop.signal = signal.SIGTERM  # as voted
        signal.raise_signal(signal.SIGTERM)  # ours, a little later
        assert stop.signal == signal.SIGTERM


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (["train.py"], "train.py"),
        (["train.py", "--coordinator=localhost:1"], "train.py"),
        (["eval_linear.py"], "eval_linear.py"),
        (["convert_checkpoints.py"], "convert_checkpoints.py"),
        (["demo.py"], "demo.py"),
        (["-m", "ifm_jax.replay"], "replay.py"),
        (["-m", "ifm_jax", "train"], "ifm-jax train"),
        (["-m", "ifm_jax", "train", "--coordinator=localhost:1"], "ifm-jax train"),
    ],
)
def test_ctrl_c_while_importing_is_one_line(tmp_path, script, name):
    """JAX is here a module that takes a minute to import."""
    (tmp_path / "jax.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    started = subprocess.Popen(
        [sys.executable, *script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout.readline() == "importing\n"
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=30)
    assert (started.returncode, said) == (130, f"{name}: interrupted; everything saved before is intact\n")


# ----------------------------------------------------------------------------------------------------------------------
# The supervisor of one process of several

SUPERVISED = """
    import os, signal, sys, time
    from ifm_jax import process
    sys.argv[0] = "train.py"
    process.begin(hosts=True)
    print(os.getpid(), os.getppid(), flush=True)
"""
RUNTIME = "os.write(2, b'F1124 client.h:80] Terminating process because the JAX distributed service detected fatal')"


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit()", 0, ""),
        # The runtime's abort for a peer is the only one that is said to be of a peer.
        (f"{RUNTIME}; os.write(2, b' errors.\\n'); os.abort()", 1, "train.py: another process of the run has ended"),
        ("os.write(2, b'double free or corruption\\n'); os.abort()", -signal.SIGABRT, "double free or corruption"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_a_supervised_process_ends_as_the_child_does(end, status, said):
    started = python(SUPERVISED + "    " + end, "--process_id=1")
    output, error = started.communicate(timeout=30)
    assert started.returncode == status, error
    assert int(output.split()[1]) == started.pid
    last = (error.strip().splitlines() or [""])[-1]
    assert last.startswith(said)
    assert bool(last) == bool(said)


def test_a_supervisor_passes_signals_on_and_takes_the_child_with_it():
    waiting = """
    def stop(*_):
        print("stopped", flush=True)
        sys.exit(5)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(60)
    """
    for number, status, last in ((signal.SIGTERM, 5, "stopped\n"), (signal.SIGKILL, -signal.SIGKILL, "")):
        started = python(SUPERVISED + waiting, "--coordinator", "localhost:1")
        child = int(started.stdout.readline().split()[0])
        assert started.stdout.readline() == "ready\n"
        started.send_signal(number)
        rest, error = started.communicate(timeout=30)
        assert (started.returncode, rest, error) == (status, last, "")
        deadline = time.monotonic() + 10
        while pathlib.Path(f"/proc/{child}").exists() and "Z" not in pathlib.Path(f"/proc/{child}/stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_process_alone_has_no_supervisor(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not process.one_of_several(["--workdir=coordinator", "--config.seed=1", "num_processes"])
    assert process.one_of_several(["-num_processes", "2"])
    for hosts, several in (("localhost", False), ("a,b", True)):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
        assert process.one_of_several([]) is several
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    output, error = python(SUPERVISED, "--workdir=x").communicate(timeout=30)
    assert int(output.split()[1]) == os.getpid(), error
