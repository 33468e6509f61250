"""Whole trajectories against PyTorch's, step for step; and what `python -m ifm_jax.replay` says and refuses."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.models import resnet
from ifm_jax.runs import loading, snapshot
from ifm_jax.torch_interop import replay
from references.moco import MUTATIONS, Reference, learning_rate, random_views
from tests.conftest import QUICK

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Relative to each quantity's largest magnitude, in float64, and nothing absolute besides.
RTOL = 1e-9
# A wrong variant has to be seen from much further away than a right one is allowed to be.
VISIBLE = 1e-6

BATCH, DIM, QUEUE = 8, 128, 24  # three batches fill the queue: five steps wrap
SIZE = 33  # the fewest pixels that leave four positions to the last stage
BASE_LR, EPOCHS, MILESTONES, EPOCH_STEPS = 0.03, 4, (1, 2), 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A trajectory: what is trained, on how many devices, and from where."""

    method: str
    epsilon: float = 0.1
    alpha: float = 1.0
    groups: int = 1
    devices: int = 1
    schedule: str = "cosine"
    weight_decay: float = 1e-4
    resumed: bool = False
    mlp: bool = True
    momentum: float = 0.99
    arch: str = "resnet18"
    width: int = 8  # at which the steps take no longer than their compilation

    def reference(self, **options) -> Reference:
        """The peer."""
        return Reference(
            self.arch,
            dim=DIM,
            width=self.width,
            queue_size=QUEUE,
            mlp=self.mlp,
            world=self.groups,
            method=self.method,
            epsilon=self.epsilon,
            alpha=self.alpha,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            **options,
        )

    def config(self, start: snapshot.Snapshot) -> Config:
        """Our recipe."""
        config = start.config
        config.model.bn_groups = self.groups
        config.moco.momentum = self.momentum
        config.ifm.method, config.ifm.epsilon, config.ifm.alpha = self.method, self.epsilon, self.alpha
        config.optim.weight_decay = self.weight_decay
        config.optim.lr, config.optim.schedule, config.optim.milestones = BASE_LR, self.schedule, MILESTONES
        config.epochs = EPOCHS
        return config


pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module", autouse=True)
def shortened():
    """Under these names one block a stage, and one stage of more than ten without the thirty others of resnet101."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.ARCHITECTURES, "resnet34", resnet.Architecture(False, (1, 1, 1, 1)))
        patch.setitem(resnet.ARCHITECTURES, "resnet101", resnet.Architecture(False, (1, 1, 11, 1)))
        yield


# Every value that the issue names is in at least one of them; the full product is benchmarks/parity_sweep.py's.
CASES = {
    "moco": Case("moco", mlp=False, arch="resnet34"),
    "ifm": Case("ifm", groups=2, devices=4, schedule="step", weight_decay=0.05, resumed=True, width=64),
    "ifm_weighted": Case("ifm", epsilon=0.05, alpha=0.5, groups=4, devices=8, schedule="step", arch="resnet34"),
    "ifm_only": Case("ifm_only", epsilon=0.2, groups=2, devices=2, resumed=True, arch="resnet34"),
}


def worst(comparisons):
    return max(comparisons, key=lambda c: c.max_rel)


def begin(case, path, **options):
    """The peer at the start of a case, and the start read from its checkpoint."""
    reference = case.reference(**options)
    epoch = 0
    if case.resumed:  # two steps are an epoch; the checkpoint then holds momentum buffers and a moved queue
        epoch = 1
        reference.run(random_views(EPOCH_STEPS, BATCH, SIZE, world=case.groups, seed=7), BASE_LR)
    reference.save_checkpoint(path, epoch)
    return reference, loading.read(path), epoch


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_trajectory(name, tmp_path):
    case = CASES[name]
    reference, start, epoch = begin(case, tmp_path / "start.pth.tar")
    views = random_views(5, BATCH, SIZE, world=case.groups, seed=1)
    rates = [learning_rate(BASE_LR, epoch + i // EPOCH_STEPS, EPOCHS, case.schedule, MILESTONES) for i in range(5)]
    expected = reference.run(views, rates)
    assert len(set(rates)) > 1

    # Through an Orbax checkpoint where the start is resumed, from the file itself otherwise.
    if case.resumed:
        snapshot.write(start, tmp_path / "converted")
        start = loading.read(tmp_path / "converted")
        assert (start.epoch, start.steps_per_epoch) == (1, EPOCH_STEPS)
    devices = jax.devices()[: case.devices]
    options = {"steps_per_epoch": EPOCH_STEPS, "devices": devices}
    if case.width == 64:  # the plain loops of float64 take longer than the compiler does to optimize them
        options["compiler_options"] = {"xla_backend_optimization_level": 1}
    found = replay.replay(case.config(start), start, views, **options)

    assert found.keys() == expected.keys()
    comparisons = replay.compare(found, expected, rtol=RTOL, atol=0.0)
    assert [c for c in comparisons if not c.holds] == []
    print(f"{name}: worst {worst(comparisons)}")


@pytest.mark.slow
def test_one_step_of_more_than_ten_blocks_in_a_stage(tmp_path):
    case = Case("ifm", groups=2, arch="resnet101")
    reference, start, _ = begin(case, tmp_path / "start.pth.tar")
    assert (start.config.model.arch, start.config.model.width) == ("resnet101", 8)
    views = random_views(1, BATCH, SIZE, world=2, seed=4) | {"lr": np.full(1, BASE_LR)}
    found = replay.replay(case.config(start), start, views, devices=jax.devices()[:1])
    comparisons = replay.compare(found, reference.run(views), rtol=RTOL, atol=0.0)
    assert [c for c in comparisons if not c.holds] == []
    print(f"resnet101: worst {worst(comparisons)}")


# The comparison sees every wrong variant of the step: two steps of ours, once, against each mutated peer's.
MUTATED = dataclasses.replace(CASES["ifm_only"], method="ifm", epsilon=0.1, alpha=0.5, weight_decay=0.05, resumed=False)


@pytest.fixture(scope="module")
def two_steps():
    return random_views(2, BATCH // 2, SIZE, world=2, seed=2) | {"lr": np.full(2, BASE_LR)}


@pytest.fixture(scope="module")
def ours(two_steps, tmp_path_factory):
    _, start, _ = begin(MUTATED, tmp_path_factory.mktemp("mutations") / "start.pth.tar")
    return replay.replay(MUTATED.config(start), start, two_steps, devices=jax.devices()[:1])


@pytest.mark.slow
def test_right_variant_holds(ours, two_steps):
    expected = MUTATED.reference().run(two_steps)
    assert [c for c in replay.compare(ours, expected, rtol=RTOL, atol=0.0) if not c.holds] == []


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_wrong_variant_is_seen(mutation, ours, two_steps):
    mutated = MUTATED.reference(mutations=frozenset({mutation})).run(two_steps)
    comparisons = replay.compare(ours, mutated, rtol=VISIBLE, atol=0.0)
    assert not all(c.holds for c in comparisons if "num_batches_tracked" not in c.name)


def test_cosine_per_step_is_seen(ours, two_steps):
    rates = [learning_rate(BASE_LR, step / EPOCH_STEPS, EPOCHS) for step in range(2)]
    comparisons = replay.compare(ours, MUTATED.reference().run(two_steps, rates), rtol=VISIBLE, atol=0.0)
    assert not all(c.holds for c in comparisons)


@pytest.mark.slow
def test_float32_first_step(tmp_path):
    case = dataclasses.replace(CASES["ifm"], resumed=False)
    reference, start, _ = begin(case, tmp_path / "start.pth.tar", dtype=torch.float32)
    views = random_views(1, BATCH, SIZE, world=case.groups, seed=3) | {"lr": np.full(1, BASE_LR)}
    expected = reference.run(views)
    found = replay.replay(case.config(start), start, views, dtype="float32", devices=jax.devices()[:1])
    assert found["final/queue"].dtype == np.float32
    first = {name: expected[name] for name in ("loss", "loss_clean", "loss_ifm", "first/query", "first/key")}
    assert [c for c in replay.compare(found, first, rtol=1e-5, atol=0.0) if not c.holds] == []
    rough = {name: expected[name] for name in ("grad_norm",)}
    assert [c for c in replay.compare(found, rough, rtol=2e-2, atol=0.0) if not c.holds] == []


# --- The parts of a replay, without training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A start and views, small; the names of files made of them."""
    folder = tmp_path_factory.mktemp("replay")
    Reference(dim=16, width=8, queue_size=16).save_checkpoint(folder / "start.pth.tar")
    np.savez(folder / "views.npz", **random_views(1, 8, 16))
    return folder


def test_a_nan_does_not_hold():
    found, expected = {"loss": np.array([1.0, np.nan])}, {"loss": np.array([1.0, 2.0])}
    assert not replay.compare(found, expected, rtol=1.0, atol=1.0)[0].holds
    assert not replay.compare(expected, found, rtol=1.0, atol=1.0)[0].holds


def test_tolerances_add_up():
    found, expected = {"x": np.array([0.0, 100.5])}, {"x": np.array([1e-3, 100.0])}
    (comparison,) = replay.compare(found, expected, rtol=4e-3, atol=0.1)
    assert comparison == ("x", 0.5, 0.005, True)
    assert not replay.compare(found, expected, rtol=4e-3, atol=0.05)[0].holds


def test_references_that_do_not_fit_are_listed():
    with pytest.raises(UsageError, match=r"final/typo \(unknown\), loss \(3,\), here \(2,\)"):
        replay.compare({"loss": np.zeros(2)}, {"final/typo": np.zeros(1), "loss": np.zeros(3)}, 0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "expected query and key"),
        ({"query": np.zeros((1, 8, 16, 16, 3), np.uint8)}, "uint8"),
        ({"key": np.zeros((2, 8, 16, 16, 3))}, "as many steps"),
        ({"permutation": np.zeros((1, 8), np.int64)}, "each row a permutation of 0 to 7"),
        ({"lr": np.zeros(3)}, "lr is"),
    ],
)
def test_bad_views_are_named(files, change, message):
    views = replay.load_npz(files / "views.npz", "views") | change
    with pytest.raises(UsageError, match=message):
        replay.check_views({name: value for name, value in views.items() if value is not None})


def test_learning_rate_that_is_not_determined(files):
    start = loading.read(files / "start.pth.tar", step=3)
    views = replay.load_npz(files / "views.npz", "views")
    start.config.model.bn_groups = 1
    with pytest.raises(UsageError, match="--steps_per_epoch"):
        replay.replay(start.config, dataclasses.replace(start, origin=None), views, devices=jax.devices()[:1])


def test_a_given_order_need_not_be_balanced(files):
    """With a permutation nothing is drawn: the checks go on to the learning rate, which is missing."""
    start = dataclasses.replace(loading.read(files / "start.pth.tar", step=3), origin=None)
    start.config.model.bn_groups, start.config.moco.shuffle_bn = 4, "balanced"
    views = replay.load_npz(files / "views.npz", "views")
    without = {name: value for name, value in views.items() if name != "permutation"}
    for given, message in ((without, r"moco\.shuffle_bn='balanced'"), (views, "--steps_per_epoch")):
        with pytest.raises(UsageError, match=message):
            replay.replay(start.config, start, given, devices=jax.devices()[:1])


def test_stripped_start_is_refused(tmp_path):
    reference = Reference(dim=16, width=8, queue_size=16)
    state = {f"module.encoder_q.{name}": value for name, value in reference.model.encoder_q.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "stripped.pth.tar")
    start = loading.read(tmp_path / "stripped.pth.tar")
    start.config.model.bn_groups = 1
    with pytest.raises(UsageError, match="no key encoder, queue"):
        replay.replay(start.config, start, random_views(1, 8, 16), devices=jax.devices()[:1])


# --- The command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, "-m", "ifm_jax.replay", *map(str, arguments)]
    # One device, and the suite's compilation cache.
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "COLUMNS": "120", "HOME": str(ROOT), "XLA_FLAGS": QUICK}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "xla-tests")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--start is missing"),
        (["--start=start.pth.tar", "--views=none.npz"], "none.npz does not exist"),
        (["--start=start.pth.tar", "--views=start.pth.tar"], "expected query and key"),
        (["--start=start.pth.tar", "--views=views.npz", "--config.moco.queue_size=32"], "but the tensors have 16"),
        (["--start=start.pth.tar", "--views=views.npz", "--config.model.bn_groups=3"], "model.bn_groups=3"),
        (["--start=start.pth.tar", "--views=views.npz", "--out=nowhere/out.npz"], "its directory does not exist"),
        (["--start=start.pth.tar", "--views=views.npz", "--dtype=float16"], "float16"),
    ],
)
def test_mistakes_end_with_status_2(files, in_process, arguments, message):
    arguments = [a.replace("=start", f"={files}/start").replace("=views", f"={files}/views") for a in arguments]
    status, _, said = in_process("ifm_jax/replay.py", *arguments)
    assert status == 2, said
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_command_compares_and_reports(files, tmp_path):
    common = [f"--start={files}/start.pth.tar", f"--views={files}/views.npz", "--config.model.bn_groups=1"]
    np.savez(tmp_path / "pointer.npz", queue_ptr=np.array([8]))
    first = run(*common, f"--reference={tmp_path}/pointer.npz", f"--out={tmp_path}/out.npz")
    assert first.returncode == 0, first.stderr
    assert "Everything holds" in first.stdout

    # One run's output is the next one's reference; here with one number changed.
    reference = replay.load_npz(tmp_path / "out.npz", "a reference")
    reference["final/encoder_q.conv1.weight"][0, 0, 0, 0] += 1e-3
    np.savez(tmp_path / "other.npz", **reference)
    second = run(*common, f"--reference={tmp_path}/other.npz", f"--json={tmp_path}/report.json")
    assert second.returncode == 1, second.stderr
    assert "DIFFERS" in second.stdout
    assert "1 of " in second.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["holds"]
    wrong = [row["name"] for row in report["quantities"] if not row["holds"]]
    assert wrong == ["final/encoder_q.conv1.weight"]
    assert {row["max_abs"] for row in report["quantities"] if row["holds"]} == {0.0}
