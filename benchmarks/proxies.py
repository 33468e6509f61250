"""Compares the memory traffic of small compiled training steps with a committed table.

    python -m benchmarks.proxies [--renew] [--only=cpu,h100,v5e] [--json=FILE]

A ResNet of two bottlenecks with ResNet-50's stem is compiled with MoCo on eight devices, and with SimCLR on one device
and given views; for the CPU, and for the H100 if its compiler is installed. `benchmarks.traffic` counts bytes and
kernels by part of the step, `benchmarks.collectives` the exchanges between devices. The table in
`tests/data/traffic.json` has these counts of an earlier state. This command and the test suite
(`tests/test_traffic.py`) compare with it. `--renew` writes it again: after a change that is worth its cost, and with a
new version of JAX.

`--only=v5e` compiles four bottlenecks at full width, 224 px and 32 images, for one chip of a TPU v5e: bytes, and the
cycles that the compiler estimates. It takes minutes, needs `pip install -e '.[tpu-plan]'`, and is not in the table.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from benchmarks import gpu_plan, tpu_plan  # isort: skip (they keep JAX from the devices)
import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import collectives, command, programs, reporting, traffic
from ifm_jax import optim, pretrain, sharding
from ifm_jax.augment import MoCoV2Augmentation
from ifm_jax.errors import UsageError
from ifm_jax.methods import MoCo, Objective, SimCLR
from ifm_jax.models import Encoder, resnet
from ifm_jax.pretrain import PretrainStep

TABLE = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "traffic.json"
TOLERANCE = 0.03  # by which a count may exceed the table's
RENEW = "python -m benchmarks.proxies --renew"

_SMALL_SHARE = 0.02  # of a program's bytes; less is not compared part by part


@dataclasses.dataclass(frozen=True)
class ProxyEncoder(Encoder):
    """An encoder of bottlenecks, one in each of some stages.

    Attributes:
      stages: how many.
    """

    stages: int = 2

    def module(self, rngs: nnx.Rngs) -> resnet.ResNet:
        """Returns the live module with fresh parameters."""
        return resnet.ResNet(
            resnet.Architecture(True, (1,) * self.stages, width=self.width),
            num_classes=self.dim,
            head="mlp",
            bn_groups=self.bn_groups,
            dtype=jnp.dtype(self.compute_dtype),
            reduce_over=self.reduce_over,
            rngs=rngs,
        )


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A training step.

    Attributes:
      method: "moco" or "simclr".
      platform: "cpu", "h100" or "v5e".
      devices: that share the batch.
      given_views: without augmentation.
      stages: of the network, with a bottleneck each.
      width: channels of the first stage.
      pixels: side of a view.
      batch: images of a step.
      queue_size: of MoCo.
    """

    method: str
    platform: str
    devices: int
    given_views: bool = False
    stages: int = 2
    width: int = 8
    pixels: int = 64
    batch: int = 32
    queue_size: int = 1024

    def __str__(self) -> str:
        return f"{self.platform} {self.method} {self.devices}"


PROXIES = (
    *(Proxy("moco", "cpu", 8), Proxy("simclr", "cpu", 1, given_views=True)),
    *(Proxy("moco", "h100", 8), Proxy("simclr", "h100", 1, given_views=True)),
)
_V5E = Proxy("moco", "v5e", 1, stages=4, width=64, pixels=224, batch=32, queue_size=4096)


def compile_proxy(proxy: Proxy) -> jax.stages.Compiled:
    """Compiles a step, on uint8 images with MoCo-v2's augmentation, or on float32 views.

    Raises:
      UsageError: if the compiler of its platform is not installed.
    """
    if proxy.platform == "cpu":
        devices = jax.devices("cpu")[: proxy.devices]
    elif proxy.platform == "v5e":
        devices = tpu_plan.devices_of(tpu_plan.Topology.parse("v5e:1x1"))
    else:
        devices = gpu_plan.devices_of(gpu_plan.Machine(gpu_plan.GPUS[proxy.platform], proxy.devices))
    mesh = sharding.make_mesh(devices)
    encoder = ProxyEncoder(
        arch="proxy",
        stages=proxy.stages,
        width=proxy.width,
        bn_groups=8 if proxy.method == "moco" else 1,
        compute_dtype="float32" if proxy.platform == "cpu" else "bfloat16",
    )
    objective, optimizer = Objective("ifm"), optim.make("sgd", 0.9, 1e-4)
    method = (
        MoCo(encoder, objective, proxy.queue_size, mesh=mesh)
        if proxy.method == "moco"
        else SimCLR(encoder, objective, mesh)
    )
    augment = (lambda rngs, views: views) if proxy.given_views else MoCoV2Augmentation()
    step = PretrainStep(method, optimizer, augment)
    state = jax.eval_shape(lambda: pretrain.create(jax.random.key(0), method, optimizer))
    images = jnp.float32 if proxy.given_views else jnp.uint8
    views = jax.ShapeDtypeStruct((proxy.batch, 2, proxy.pixels, proxy.pixels, 3), images)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rates = jax.ShapeDtypeStruct((1000,), jnp.float32)
    return step.jit().lower(state, {"views": views}, rng, rates).compile()


def count(proxy: Proxy, text: str) -> dict:
    """Returns the counts of a compiled step, for each device.

    Args:
      proxy: the step.
      text: of the compiled program.

    Returns:
      `bytes`, `kernels`, `sources` (`bytes` and `kernels` of each), `collectives` (`count` and `bytes` of each kind and
      dtype), and `cycles` if the compiler estimates them.
    """
    kernels = traffic.kernels(programs.parse(text))
    exchanged: dict[str, dict[str, int]] = {}
    for one in collectives.read(text, proxy.devices) if proxy.devices > 1 else ():
        row = exchanged.setdefault(f"{one.kind} {one.dtype}", {"count": 0, "bytes": 0})
        row["count"] += one.count
        row["bytes"] += one.bytes
    found = {
        "bytes": round(sum(kernel.bytes for kernel in kernels)),
        "kernels": sum(kernel.runs for kernel in kernels),
        "sources": traffic.by_source(kernels),
        "collectives": exchanged,
    }
    cycles = sum(kernel.cycles for kernel in kernels)
    return found | ({"cycles": cycles} if cycles else {})


def worse(found: dict, before: dict) -> list[str]:
    """Returns what a program has more of than the table says, by more than `TOLERANCE`, a line for each.

    Args:
      found: by `count`.
      before: of the table.
    """
    lines = []

    def compare(what: str, new: float, old: float) -> None:
        if new > old * (1 + TOLERANCE):
            share = f"{new / old - 1:+.1%}" if old else "new"
            lines.append(f"{what}: {new:,} instead of {old:,} ({share})")

    for name in ("bytes", "kernels"):
        compare(f"{name} of the step", found[name], before[name])
    for source, row in found["sources"].items():
        old = before["sources"].get(source, {"bytes": 0, "kernels": 0})
        if row["bytes"] > _SMALL_SHARE * found["bytes"]:
            compare(f"bytes of {source}", row["bytes"], old["bytes"])
    for kind, row in found["collectives"].items():
        old = before["collectives"].get(kind, {"count": 0, "bytes": 0})
        compare(f"{kind}, number", row["count"], old["count"])
        compare(f"{kind}, bytes", row["bytes"], old["bytes"])
    return lines


def read_table() -> dict:
    """Returns the committed table: `jax` (its version) and `programs`, counts by name."""
    return json.loads(TABLE.read_text())


def can_compile(platform: str) -> bool:
    """Returns whether the compiler for a platform is installed."""
    try:
        {"cpu": lambda: None, "h100": gpu_plan.require_wheels, "v5e": tpu_plan.require_libtpu}[platform]()
    except UsageError:
        return False
    return True


def _chosen(platforms: Sequence[str]) -> list[Proxy]:
    known = {proxy.platform: None for proxy in (*PROXIES, _V5E)}
    for platform in platforms:
        if platform not in known:
            raise UsageError(f"--only={platform}: expected some of {', '.join(known)}")
    return [proxy for proxy in (*PROXIES, _V5E) if proxy.platform in platforms]


def main(arguments: list[str]) -> int:
    """Compiles, compares, writes; returns 1 if something is worse than in the table."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    jax.config.update("jax_num_cpu_devices", max(proxy.devices for proxy in PROXIES))
    platforms = _ONLY.value or [name for name in ("cpu", "h100") if can_compile(name)]
    found: dict[str, dict] = {}
    for proxy in _chosen(platforms):
        print(f"Compiling {proxy} ...", flush=True)
        found[str(proxy)] = count(proxy, compile_proxy(proxy).as_text())
    if _RENEW.value:
        table = read_table() if TABLE.exists() else {"programs": {}}
        same = table.get("jax") == jax.__version__
        own = {name: row for name, row in found.items() if not name.startswith("v5e")}
        kept = {name: row for name, row in table["programs"].items() if same}
        TABLE.write_text(json.dumps({"jax": jax.__version__, "programs": kept | own}, indent=1) + "\n")
        print(f"Written: {TABLE}")
        if stale := sorted(kept.keys() - own.keys()):
            print(f"Not renewed, since their compiler is not installed or they were not asked for: {', '.join(stale)}")
    table, bad = read_table(), []
    rows = []
    for name, row in found.items():
        before = table["programs"].get(name) if table["jax"] == jax.__version__ else None
        bad += [f"{name}: {line}" for line in (worse(row, before) if before else ())]
        rows.append({"program": name} | row | ({"before": before["bytes"]} if before else {}))
        lines = [{"source": source, **counts} for source, counts in row["sources"].items()]
        title = f"{name}: {row['bytes'] / 1e6:.3f} MB in {row['kernels']} kernels"
        title += f", {row['cycles']:,.0f} cycles" if "cycles" in row else ""
        reporting.print_table(title, lines, {"source": "", "kernels": "d", "bytes": ",d"})
    print("\n".join(bad) or "No count exceeds the table's.")
    made = reporting.report("proxies", rows, {"worse": bad}, others=("libtpu", "jax-cuda12-plugin"))
    reporting.write(made, _JSON.value)
    return 1 if bad else 0


if __name__ == "__main__":
    _RENEW = flags.DEFINE_bool("renew", False, "Write the table anew.")
    _ONLY = flags.DEFINE_list("only", None, "Some of cpu, h100 and v5e; cpu, and h100 if its compiler is there.")
    _JSON = flags.DEFINE_string("json", None, "Write the rows and the summary to this JSON file.")
    command.run(main)
