"""The compiled training step against PyTorch's on the same device: same network, shapes and method, in one run.

    python -m benchmarks.train_step [--json=FILE] [--profile=DIR] [--cases=resnet8:32:256,...] [--rounds=25]

Variants: this package with IFM and with MoCo, on a CPU also with oneDNN if it is there; PyTorch with IFM (a) as
published, float32 and contiguous, and (b) with what suits accelerators: bfloat16 autocast, channels_last, fused SGD,
with and without torch.compile (which takes minutes on a CPU and may not pay off). Every round runs one step of each in
another order. Our step computes in float32 on a CPU and in bfloat16 elsewhere. The views are given (float, normalized),
so that neither side includes augmentation, which PyTorch does elsewhere. BatchNorm has one group.

For each: median and quartiles of a step's milliseconds, images/s, compile time, and memory that the compiled program
needs (PyTorch's peak on CUDA). For ours also the model FLOPs per second, XLA's count for the step as written divided by
the time, and its share of the peak if the device's is known. Then the time of each part, compiled by itself, including
MoCo-v2's augmentation of one view and the shuffle, which are not in the timed step. `--profile=DIR` writes a trace of
three steps for TensorBoard or Perfetto.

Requires jax, flax, optax and numpy; PyTorch for the comparison.
"""

import dataclasses
import functools
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import command, reporting
from ifm_jax import optim, pretrain, sharding
from ifm_jax.augment import MoCoV2Augmentation, example_rngs
from ifm_jax.choices import CPUConvolutions
from ifm_jax.errors import UsageError
from ifm_jax.methods import MoCo, Objective, losses, queue
from ifm_jax.models import Encoder, onednn
from ifm_jax.models.resnet import ARCHITECTURES
from ifm_jax.pretrain import PretrainStep, TrainState

DIM = 128
WITH_ONEDNN = "ifm_jax, IFM, oneDNN"
_SLOW, _ROUNDS_OF_SLOW = 5, 3  # a peer so many times slower than the fastest variant is timed so often

# Dense bfloat16 operations a second, by what JAX calls the device: NVIDIA's data sheets (the SXM models) and Google's
# pages on each TPU.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
OPTIMIZER = optim.make("sgd", 0.9, 1e-4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network at a size.

    Attributes:
      arch: of `ARCHITECTURES`.
      pixels: side of a view.
      batch: images of a step.
      stem: of `models.STEMS`.
      queue_size: K.
      bn_groups: BatchNorm groups; with more than one, the keys are shuffled.
      cpu_convolutions: who computes convolutions on a CPU, "xla" or "onednn".
    """

    arch: str
    pixels: int
    batch: int
    stem: str
    queue_size: int
    bn_groups: int = 1
    cpu_convolutions: CPUConvolutions = "xla"

    @staticmethod
    def fitting(arch: str, pixels: int, batch: int) -> "Case":
        """Returns the case with the stem and the queue that fit the size."""
        large = pixels > 96
        stem = "small_stride2" if arch == "resnet8" and not large else "imagenet"
        return Case(arch, pixels, batch, stem, queue_size=65536 if large else 16 * batch)

    def __str__(self) -> str:
        return f"{self.arch}, {self.pixels} px, batch {self.batch}"


def views(case: Case, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Returns a batch: normal numbers, or with "uint8" images before augmentation."""
    rng = np.random.default_rng(0)
    shape = (case.batch, 2, case.pixels, case.pixels, 3)
    if dtype == "uint8":
        return {"views": rng.integers(0, 256, shape, np.uint8)}
    return {"views": rng.normal(size=shape).astype(np.float32)}


def make_step(case: Case, method: str, mesh: jax.sharding.Mesh | None = None) -> PretrainStep:
    """Returns the training step, without augmentation."""
    compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    encoder = Encoder(
        arch=case.arch,
        stem=case.stem,
        dim=DIM,
        bn_groups=case.bn_groups,
        compute_dtype=compute_dtype,
        cpu_convolutions=case.cpu_convolutions,
    )
    objective = Objective("infonce" if method == "moco" else method)
    moco = MoCo(encoder, objective, case.queue_size, shuffle=case.bn_groups > 1, mesh=mesh)
    return PretrainStep(moco, OPTIMIZER, lambda rngs, images: images.astype(jnp.float32))


def make_state(case: Case, step: PretrainStep, placement: jax.sharding.Sharding | None = None) -> TrainState:
    """Returns the state that a step starts from, placed so; None: on the first device."""
    return _creator(step.method.encoder, case.queue_size, placement)()


@functools.cache
def _creator(encoder: Encoder, queue_size: int, placement: jax.sharding.Sharding | None) -> Callable:
    """Returns the compiled start, which is the same for every batch and size of a view."""
    moco = MoCo(encoder, Objective(), queue_size)
    # The key is drawn inside: this is called while another function is traced, too.
    return jax.jit(lambda: pretrain.create(jax.random.key(0), moco, OPTIMIZER), out_shardings=placement)


def arguments() -> tuple[jax.Array, jax.Array]:
    """Returns the random key and the learning rates of a step."""
    return jax.random.key(0), jnp.full(1_000_000, 0.03)


def lower(case: Case, step: PretrainStep, dtype: str = "float32") -> jax.stages.Lowered:
    """Returns the step for a state and a batch of `views`, not yet compiled; nothing is computed."""
    images = jax.ShapeDtypeStruct((case.batch, 2, case.pixels, case.pixels, 3), jnp.dtype(dtype))
    begin = jax.eval_shape(lambda: make_state(case, step))
    return step.jit().lower(begin, {"views": images}, *jax.eval_shape(arguments))


def known(program: jax.stages.Compiled) -> dict:
    """Returns what the compiler says of a program, for each device.

    Returns:
      `bytes`: of memory, arguments included; `flops`: floating-point operations, and `bytes accessed`: arguments and
      results of every operation; None where this back end does not count them.
    """
    memory, cost = program.memory_analysis(), program.cost_analysis()
    cost = (cost[0] if isinstance(cost, list) else cost) or {}
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "bytes": peak - memory.alias_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes accessed": cost.get("bytes accessed"),
    }


def ours(
    case: Case, method: str = "ifm", devices: Sequence[jax.Device] | None = None, dtype: str = "float32"
) -> tuple[Callable[[], None], dict, jax.stages.Compiled]:
    """Compiles a step.

    Args:
      case: the network.
      method: see `PretrainStep`.
      devices: that it runs on; None: the first one.
      dtype: of the images; see `views`.

    Returns:
      What takes a step and waits for it; what is known of the program: `compile s`, `model flops` of the step as it is
      written, and what `known` returns; the program.
    """
    mesh = None if devices is None else sharding.make_mesh(devices)
    step = make_step(case, method, mesh)
    begun = time.perf_counter()
    lowered = lower(case, step, dtype)
    program = lowered.compile()
    seconds = time.perf_counter() - begun
    replicated, split = (None, None) if mesh is None else (sharding.replicated(mesh), sharding.split(mesh))
    held = [make_state(case, step, replicated)]
    batch = jax.device_put(views(case, dtype), split)
    rng_and_rates = jax.device_put(arguments(), replicated)

    def run() -> None:
        held[0], metrics = program(held[0], batch, *rng_and_rates)
        jax.block_until_ready(metrics)

    of_model = (lowered.cost_analysis() or {}).get("flops")
    return run, {"compile s": seconds, "model flops": of_model} | known(program), program


def _torchs(case: Case, best: bool, compiled: bool = False) -> tuple[Callable[[], None], dict]:
    """Returns the same of PyTorch's step, with IFM."""
    import torch

    from references.moco_step import Step

    cuda = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    step = Step(case.arch, case.stem, DIM, case.queue_size, "ifm", best, compiled, device)
    layout = torch.channels_last if best else torch.contiguous_format
    query, key = (
        torch.tensor(view.transpose(0, 3, 1, 2)).to(device).contiguous(memory_format=layout)
        for view in np.moveaxis(views(case)["views"], 1, 0)
    )

    def run() -> None:
        step(query, key)
        if cuda:
            torch.cuda.synchronize()

    begun = time.perf_counter()
    run()
    found = {"compile s": time.perf_counter() - begun}
    if cuda:
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        found["bytes"] = torch.cuda.max_memory_allocated()
    return run, found


def measure(case: Case, rounds: int) -> list[dict]:
    """Returns a row for each variant of a case."""
    variants = {"ifm_jax, IFM": ours(case, "ifm")[:2], "ifm_jax, MoCo": ours(case, "moco")[:2]}
    if jax.default_backend() == "cpu" and onednn.is_available():
        run, found, _ = ours(dataclasses.replace(case, cpu_convolutions="onednn"), "ifm")
        # XLA does not see the operations in a library.
        variants[WITH_ONEDNN] = run, found | {"model flops": variants["ifm_jax, IFM"][1]["model flops"]}
    plain = ARCHITECTURES[case.arch].groups == 1 and ARCHITECTURES[case.arch].width_per_group == 64
    if importlib.util.find_spec("torch") and plain:
        variants["PyTorch, as published"] = _torchs(case, best=False)
        variants["PyTorch, bfloat16"] = _torchs(case, best=True)
        try:
            variants["PyTorch, bfloat16, compiled"] = _torchs(case, best=True, compiled=True)
        except Exception as error:  # torch.compile needs a compiler that is not everywhere
            print(f"PyTorch, bfloat16, compiled: left out ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
    times, warm = {name: [] for name in variants}, {}
    for number in range(rounds + 2):
        for name in random.Random(number).sample(sorted(variants), len(variants)):
            slow = len(times[name]) >= _ROUNDS_OF_SLOW and warm[name] > _SLOW * min(warm.values())
            if slow and name.startswith("PyTorch"):  # ours are compared round by round
                continue
            begun = time.perf_counter()
            variants[name][0]()
            warm[name] = time.perf_counter() - begun
            if number > 1:
                times[name].append(1e3 * warm[name])
    rows = []
    for name, (_, found) in variants.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        row = {"case": str(case), "variant": name, "ms": median, "quartiles": [low, high], "times": times[name]}
        row |= {"images_per_sec": case.batch / median * 1e3} | found
        if found.get("model flops"):
            row["tflops_per_sec"] = found["model flops"] / median / 1e9
            kind = jax.devices()[0].device_kind
            if peak := next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None):
                row["utilization"] = row["tflops_per_sec"] * 1e12 / peak
        rows.append(row)
    return rows


def parts(case: Case, rounds: int) -> dict:
    """Returns what each part of a step takes, in milliseconds, compiled by itself."""
    step = make_step(case, "ifm")
    begin, objective = make_state(case, step), step.method.objective
    momentum_params, _, negatives, pointer = begin.memory
    batch = jax.device_put(views(case))
    pixels = jnp.clip(128 + 64 * batch["views"][:, 0], 0, 255).astype(jnp.uint8)
    embeddings = jax.nn.standardize(jax.random.normal(jax.random.key(1), (2, case.batch, DIM)))
    embeddings = embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)

    def forward(params, images):
        return step.method.encoder(params, begin.batch_stats, images, train=True)[0]

    def backward(params, images):
        return jax.grad(lambda params: jnp.sum(forward(params, images) * embeddings[0]))(params)

    def loss(query, key, negatives):
        return jnp.mean(losses.ifm_info_nce(query, key, negatives, objective.temperature, objective.epsilon))

    def update(params, gradient, opt_state):
        updates, opt_state = step.optimizer.update(gradient, opt_state, params, learning_rate=jnp.asarray(0.03))
        return optax.apply_updates(params, updates), opt_state

    def shuffled(images, keys, rng):
        order = jax.random.permutation(rng, len(images))
        return images[order], keys[jnp.argsort(order)]

    def augmented(rng, images):
        return MoCoV2Augmentation()(example_rngs(rng, jnp.arange(len(images))), images)

    def momentum(averages, params):
        return jax.tree.map(lambda k, q: 0.999 * k + 0.001 * q, averages, params)

    programs = {
        "forward": (forward, (begin.params, batch["views"][:, 0])),
        "forward and backward": (backward, (begin.params, batch["views"][:, 0])),
        "loss": (jax.value_and_grad(loss), (embeddings[0], embeddings[1], negatives)),
        "optimizer": (update, (begin.params, begin.params, begin.opt_state)),
        "momentum update": (momentum, (momentum_params, begin.params)),
        "enqueue": (queue.enqueue, (negatives, pointer, embeddings[1])),
        "shuffle": (shuffled, (pixels, embeddings[1], jax.random.key(2))),
        "augmentation of a view": (augmented, (jax.random.key(3), pixels)),
    }
    row = {"case": str(case)}
    for name, (function, arguments) in programs.items():
        program = jax.jit(function).lower(*arguments).compile()
        times = []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times.append(1e3 * (time.perf_counter() - begun))
        row[f"{name} ms"] = statistics.median(times[1:])
    row["backward ms"] = max(row["forward and backward ms"] - row["forward ms"], 0.0)
    return row


def summary(rows: list[dict]) -> dict:
    """Returns the ratios of the last case, the largest, and of each."""
    cases = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["variant"]] = row
    found = {}
    for name, variants in cases.items():
        ours, moco = variants["ifm_jax, IFM"], variants["ifm_jax, MoCo"]
        ratios = [a / b for a, b in zip(ours["times"], moco["times"], strict=True)]
        of_case = {"ifm_over_moco": statistics.median(ratios), "peak_bytes": ours["bytes"]}
        best = [peer for peer in variants if peer.startswith("PyTorch, bfloat16")]
        for field, peers in (("vs_torch_original", ["PyTorch, as published"]), ("vs_torch_best", best)):
            if peers := [variants[peer]["ms"] for peer in peers if peer in variants]:
                of_case[field] = min(peers) / ours["ms"]
                if WITH_ONEDNN in variants:
                    of_case[f"onednn_{field}"] = min(peers) / variants[WITH_ONEDNN]["ms"]
        found[name] = of_case
    return list(found.values())[-1] | {"cases": found}


def _cases(given: list[str] | None) -> list[Case]:
    if given is None:
        backend = jax.default_backend()
        given = ["resnet8:32:256", "resnet18:64:32"] if backend == "cpu" else ["resnet50:224:64", "resnet50:224:256"]
    cases = []
    for text in given:
        try:
            arch, pixels, batch = text.split(":")
            cases.append(Case.fitting(arch, int(pixels), int(batch)))
        except ValueError:
            raise UsageError(f"--cases={text}: expected ARCH:PIXELS:BATCH, such as resnet50:224:256") from None
        if arch not in ARCHITECTURES:
            raise UsageError(f"--cases={text}: expected one of {', '.join(ARCHITECTURES)}")
    return cases


def main(arguments: list[str]) -> int:
    """Measures and reports; returns the exit status."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    cases, rounds = _cases(_CASES.value), _ROUNDS.value
    rows, of_parts = [], []
    for case in cases:
        print(f"{case} ...", flush=True)
        rows += measure(case, rounds)
        of_parts.append(parts(case, rounds))
    if _PROFILE.value:
        run, *_ = ours(cases[0], "ifm")
        run()
        with jax.profiler.trace(_PROFILE.value):
            for _ in range(3):
                run()
    columns = {"case": "", "variant": "", "ms": ".1f", "images_per_sec": ".0f", "compile s": ".1f"}
    columns |= {"bytes": lambda value: f"{value / 2**20:.0f} MiB", "tflops_per_sec": ".2f", "utilization": ".0%"}
    reporting.print_table("A training step", rows, columns)
    names = [name for name in of_parts[0] if name.endswith(" ms")]
    reporting.print_table("Its parts, each compiled by itself", of_parts, {"case": ""} | dict.fromkeys(names, ".1f"))
    found = summary(rows)
    ratios = [{"case": name} | values for name, values in found["cases"].items()]
    columns = dict.fromkeys(("ifm_over_moco", "vs_torch_original", "vs_torch_best"), ".2f")
    if any("onednn_vs_torch_original" in row for row in ratios):
        columns |= dict.fromkeys(("onednn_vs_torch_original", "onednn_vs_torch_best"), ".2f")
    reporting.print_table(
        "Ratios: time of IFM's step over MoCo's; our images/s over PyTorch's", ratios, {"case": ""} | columns
    )
    reporting.write(reporting.report("train_step", rows + of_parts, found, ["torch"]), _JSON.value)
    return 0


if __name__ == "__main__":
    _JSON = flags.DEFINE_string("json", None, "Write the report to this JSON file.")
    _PROFILE = flags.DEFINE_string("profile", None, "Write a trace of three steps of the first case to this directory.")
    _CASES = flags.DEFINE_list("cases", None, "Cases as ARCH:PIXELS:BATCH, ...; default: those that suit the device.")
    _ROUNDS = flags.DEFINE_integer("rounds", 25, "Number of timings of each quantity.")
    command.run(main)
