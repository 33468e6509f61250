"""What evaluation costs: a sweep of classifiers, nearest neighbors, and evaluation during pre-training.

    python -m benchmarks.evaluation [--json=FILE]

- The sweep: a step of linear evaluation (features of a batch of crops, then the update of every classifier) with 1 and
  with 16 classifiers, alternating.
- Nearest neighbors: 5,000 queries in a bank of 5,000 x 512 features, compared with a NumPy loop over the queries.
- During pre-training: steps of a run with `eval.every`, without the evaluations themselves, compared with those of a
  run without it.
"""

import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import command, reporting
from ifm_jax import assembly, sharding
from ifm_jax.config import Config
from ifm_jax.evaluation import classifiers, knn
from ifm_jax.evaluation.features import FrozenEncoder
from ifm_jax.runs import metrics_log, training

_JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of timings of each quantity.")

HEADS = 16


def sweep(rounds: int, arch: str, size: int, batch: int, classes: int) -> dict:
    """Returns the median milliseconds of a step with one and with 16 classifiers, and their ratio."""
    config = Config()
    config.model.arch, config.data.image_size = arch, size
    config.model.stem = "imagenet" if size > 64 else "small"
    config = assembly.resolve(config)
    encoder = assembly.make_encoder(config)
    params, batch_stats = encoder.init(jax.random.key(0))
    frozen = FrozenEncoder(encoder, params, batch_stats, mesh=sharding.make_mesh(jax.devices()[:1]))
    views = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    labels = jax.random.randint(jax.random.key(2), (batch,), 0, classes)
    width = jax.eval_shape(frozen.apply, frozen.weights, views).shape[1]

    def step(state, weights, views, labels):
        count = state.params["bias"].shape[0]
        lr = jnp.linspace(0.1, 10.0, count)
        return classifiers.update(state, frozen.apply(weights, views), labels, lr, jnp.zeros((count,)))

    programs = {}
    for count in (1, HEADS):
        state = classifiers.create(jax.random.key(3), count, width, classes)
        programs[count] = jax.jit(step).lower(state, frozen.weights, views, labels).compile(), state
    times = {1: [], HEADS: []}
    for number in range(rounds + 1):
        for count, (program, state) in programs.items():
            begun = time.perf_counter()
            jax.block_until_ready(program(state, frozen.weights, views, labels))
            if number:
                times[count].append(1e3 * (time.perf_counter() - begun))
    one, many = (statistics.median(times[count]) for count in (1, HEADS))
    name = f"step of linear evaluation, {arch}, {size} px, batch {batch}, {classes} classes"
    return {"name": name, "one head ms": one, f"{HEADS} heads ms": many, "ratio": many / one}


def neighbors(rounds: int) -> dict:
    """Returns the median seconds of the classification and of a loop over queries in NumPy, and their ratio."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(2, 5000, 512)).astype(np.float32)
    labels = rng.integers(0, 100, 5000)

    def loop(few: np.ndarray) -> None:
        known = bank / np.linalg.norm(bank, axis=1, keepdims=True)
        for query in few:
            similarity = known @ (query / np.linalg.norm(query))
            nearest = np.argsort(-similarity)[:200]
            np.bincount(labels[nearest], np.exp(similarity[nearest] / 0.07), minlength=100).argmax()

    knn.classify(bank, labels, queries, 100)
    ours, theirs = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        knn.classify(bank, labels, queries, 100)
        ours.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        loop(queries[:500])
        theirs.append(10 * (time.perf_counter() - begun))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    name = "5,000 queries, 5,000 x 512 bank"
    return {"name": name, "ours s": ours, "loop s": theirs, "ratio": theirs / ours}


def now_and_then(rounds: int) -> dict:
    """Returns the median images/s between evaluations, with and without them, and their ratio."""
    rates = {0: [], 1: []}
    for _ in range(rounds):
        for every in rates:
            config = Config()
            config.model.arch, config.model.stem, config.model.bn_groups = "resnet8", "small_stride2", 2
            config.moco.queue_size, config.data.image_size, config.data.augmentation = 2048, 32, "trifeature"
            config.data.trifeature.train_size, config.data.trifeature.test_size = 2048, 1024
            config.batch_size, config.epochs, config.log_every, config.eval.every = 64, 3, 8, every
            with tempfile.TemporaryDirectory() as workdir:
                training.train(config, workdir, quiet=True)
                records = metrics_log.read(f"{workdir}/metrics.jsonl")
            rates[every] += [record["images_per_sec"] for record in records[1:]]
    without, with_it = (statistics.median(rates[every]) for every in (0, 1))
    name = "pre-training of resnet8, evaluated every epoch"
    return {"name": name, "without images/s": without, "with images/s": with_it, "ratio": without / with_it}


def main(arguments: list[str]) -> int:
    """Measures and reports; returns the exit status."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    assembly.configure_jax()
    rounds = _ROUNDS.value
    small = jax.default_backend() == "cpu"
    case = ("resnet18", 64, 32, 100) if small else ("resnet50", 224, 128, 1000)
    rows = [sweep(rounds, *case), neighbors(rounds), now_and_then(max(1, rounds // 2))]
    summary = {
        "sweep_of_16_over_one": rows[0]["ratio"],
        "loop_over_knn": rows[1]["ratio"],
        "step_with_evaluation_over_without": rows[2]["ratio"],
    }
    for row in rows:
        reporting.print_table(row["name"], [row], {name: ".3g" for name in row if name != "name"})
    reporting.write(reporting.report("evaluation", rows, summary, ["scikit-learn"]), _JSON.value)
    return 0


if __name__ == "__main__":
    command.run(main)
