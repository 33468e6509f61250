"""What the work around the compiled step costs: a whole run, against its program called back to back.

    python -m benchmarks.loop [--config=configs/x.py] [--config.field=value] [--steps=96] [--calls=8]
        [--rounds=3] [--json=FILE]

The loop of `train.py` (`ifm_jax.train`: images, metrics, checkpoints, signals) runs a recipe, by default the embedded
one, in three variants: with images from the host, with the data set on the device (`data.cache=device`), and with
several steps per call (`steps_per_call`). Then the compiled program of each is called as often, without anything around
it. The overhead is the extra time of a step in the run, in percent of it. Times are medians over several rounds, each
of which runs every variant.
"""

import pathlib
import random
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import flags

from benchmarks import command, reporting
from ifm_jax import assembly, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.data import Source, on_device, open_source, steps_per_epoch, training_batches
from ifm_jax.data.on_device import copies_side, on_device_batches, read_all
from ifm_jax.errors import UsageError
from ifm_jax.runs import metrics_log, training

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_STEPS = flags.DEFINE_integer("steps", 96, "Steps of a run; the first third is not timed.")
_CALLS = flags.DEFINE_integer("calls", 8, "steps_per_call of the third variant.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each variant.")
_JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")


def _size(config: Config, source: Source) -> int:
    """Returns how many images a run trains on."""
    return min(config.data.limit, len(source)) if config.data.limit else len(source)


def _of_run(config: Config) -> float:
    """Returns the milliseconds that a step of a whole run takes."""
    with tempfile.TemporaryDirectory() as folder:
        training.train(config, folder, devices=jax.devices()[:1], quiet=True)
        lines = metrics_log.read(pathlib.Path(folder) / "metrics.jsonl")[1:]  # with the first come threads and caches
    return statistics.median(1e3 * config.batch_size / line["images_per_sec"] for line in lines)


class _Program:
    """The compiled program of a run, and the arguments of its first call."""

    def __init__(self, config: Config):
        config = assembly.resolve(config)
        mesh = sharding.make_mesh(jax.devices()[:1])
        source = open_source(config.data, "train")
        size = _size(config, source)
        step = assembly.make_step(config, mesh)
        self._state = jax.jit(assembly.state_creator(config, mesh))()
        self._steps = config.steps_per_call
        if config.data.cache:
            pixels, copies = read_all(source, size, copies_side(source, config.data.image_size, config.data.cache_size))
            (call, _), *_ = on_device_batches(copies, config.batch_size, [self._steps], self._steps, seed=0)
            step = on_device.OnDeviceStep(step, config.data.image_size, self._steps)
            self._arguments = tuple(sharding.place_everywhere(mesh, (pixels, call)))
        else:
            self._arguments = (sharding.put_batch(mesh, next(training_batches(source, config.batch_size, seed=0))),)
        self._arguments += assembly.step_arguments(config, steps_per_epoch(size, config.batch_size), mesh)
        self._program = step.jit().lower(self._state, *self._arguments).compile()

    def __call__(self, steps: int) -> float:
        """Returns the milliseconds a step takes."""
        begun = time.perf_counter()
        for _ in range(max(1, steps // self._steps)):
            self._state, found = self._program(self._state, *self._arguments)
        jax.block_until_ready(found)
        return 1e3 * (time.perf_counter() - begun) / max(1, steps // self._steps) / self._steps


def measure(config: Config, steps: int, calls: int, rounds: int) -> list[dict]:
    """Returns a row for each way."""
    ways = {"images from the host": ("", 1), "data.cache=device": ("device", 1)}
    ways[f"data.cache=device, steps_per_call={calls}"] = ("device", calls)
    runs, programs, rows = {}, {}, []
    for name, (cache, count) in ways.items():
        runs[name] = configs.from_dict(configs.to_dict(config))
        runs[name].data.cache, runs[name].steps_per_call = cache, count
        runs[name].steps, runs[name].log_every = steps, max(1, steps // 3)
        runs[name].eval.every, runs[name].checkpoint_best = 0, ""
        configs.validate(runs[name])
        programs[name] = _Program(runs[name])
        programs[name](1)
    times = {name: {"run": [], "program": []} for name in ways}
    for number in range(rounds):
        for name in random.Random(number).sample(list(ways), len(ways)):
            times[name]["run"].append(_of_run(runs[name]))
            times[name]["program"].append(programs[name](steps // 3))
    for name, of in times.items():
        run, program = statistics.median(of["run"]), statistics.median(of["program"])
        shares = [1 - alone / whole for whole, alone in zip(of["run"], of["program"], strict=True)]
        row = {"way": name, "run ms": run, "program ms": program, "overhead %": 100 * statistics.median(shares)}
        rows.append(row | {"images_per_sec": 1e3 * config.batch_size / run, "times": of})
    return rows


def main(arguments: list[str]) -> int:
    """Measures and reports; returns the exit status."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    config, steps, calls = _config(), _STEPS.value, _CALLS.value
    if min(steps // 3, calls) < 2:
        raise UsageError(f"--steps={steps} --calls={calls}: expected at least 6 and 2")
    assembly.configure_jax(config.model.compute_dtype)
    total = config.epochs * steps_per_epoch(_size(config, open_source(config.data, "train")), config.batch_size)
    config.epochs *= int(np.ceil(steps / total))
    rows = measure(config, steps, calls, _ROUNDS.value)
    columns = {"way": ""} | dict.fromkeys(("run ms", "program ms"), ".2f")
    columns |= {"overhead %": ".1f", "images_per_sec": ".0f"}
    reporting.print_table(f"A step of a run, {config.model.arch}, batch {config.batch_size}", rows, columns)
    summary = {"case": f"{config.model.arch}, {config.data.image_size} px, batch {config.batch_size}"}
    summary |= {
        f"overhead_{field}": row["overhead %"] / 100
        for field, row in zip(("host", "device", "device_calls"), rows, strict=True)
    }
    reporting.write(reporting.report("loop", rows, summary), _JSON.value)
    return 0


if __name__ == "__main__":
    _config = command.define_config(default=str(_ROOT / "configs" / "trifeature.py"))
    command.run(main)
