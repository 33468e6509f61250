"""The PyTorch peer itself: emulated ranks against real processes, wrong variants seen, resuming bit for bit."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from references.moco import MUTATIONS, Reference, ReferenceMoCo, learning_rate, random_views

ROOT = pathlib.Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.torch
MODEL = {"arch": "resnet18", "width": 8, "dim": 16, "queue_size": 16, "mlp": True}
TRAINING = {"epsilon": 0.1, "alpha": 0.5, "temperature": 0.2, "momentum": 0.99, "weight_decay": 1e-2}
LR = (0.03, 0.03, 0.02, 0.02)
STEPS, BATCH, SIZE = 4, 8, 32  # 32 keys through a queue of 16: it wraps twice.


def relative_error(actual, expected):
    """Largest error over the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny)


def errors(actual, expected):
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on shared cores wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def views():
    return random_views(STEPS, BATCH, SIZE, world=2, seed=3)


@pytest.fixture(scope="module")
def two_steps(views):
    return {name: value[:2] for name, value in views.items()}


@pytest.fixture(scope="module")
def baseline(two_steps):
    return Reference(**MODEL, **TRAINING, world=2).run(two_steps, LR[:2])


def test_emulated_ranks_equal_two_processes(tmp_path):
    # 64 pixels: at 32 BatchNorm over four values a channel makes 1e-8 of a rounding (1e-15) in five steps, at 64 1e-13.
    views = random_views(STEPS, BATCH, 64, world=2, seed=3)
    start, recorded, out = tmp_path / "start.pth.tar", tmp_path / "views.npz", tmp_path / "out.npz"
    reference = Reference(**MODEL, **TRAINING, world=2)
    reference.run({name: value[:1] for name, value in views.items()}, 0.01)  # So that momentum buffers are there.
    reference.save_checkpoint(start)
    np.savez(recorded, **views, lr=np.asarray(LR))
    flags = [f"--start={start}", f"--views={recorded}", f"--out={out}", "--world=2"]
    for name, value in {**MODEL, **TRAINING}.items():
        flags.append(f"--{name.replace('_', '-')}={value}" if name != "mlp" else "--mlp")
    done = subprocess.run(
        [sys.executable, "-m", "references.moco_ddp", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out) as file:
        found = errors(reference.run(views, LR), dict(file))
    assert {name: error for name, error in found.items() if not error <= 1e-10} == {}


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_wrong_variant_shows(mutation, two_steps, baseline):
    mutated = Reference(**MODEL, **TRAINING, world=2, mutations=frozenset({mutation})).run(two_steps, LR[:2])
    found = errors(mutated, baseline)
    assert max(error for name, error in found.items() if "num_batches_tracked" not in name) > 1e-6


def test_resumed_equals_uninterrupted(views, tmp_path):
    halves = [{name: value[part] for name, value in views.items()} for part in (slice(0, 2), slice(2, 4))]
    whole = Reference(**MODEL, **TRAINING, world=2).run(views, LR)
    first = Reference(**MODEL, **TRAINING, world=2)
    before = first.run(halves[0], LR[:2])
    first.save_checkpoint(tmp_path / "half.pth.tar", epoch=7)
    second = Reference(**MODEL, **TRAINING, world=2, seed=99)
    assert second.load_checkpoint(tmp_path / "half.pth.tar") == 7
    after = second.run(halves[1], LR[2:])
    for name, expected in whole.items():
        if name.startswith("first/"):
            actual = before[name]
        else:
            actual = after[name] if name.startswith("final/") else np.concatenate([before[name], after[name]])
        np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_checkpoint_has_the_originals_layout(tmp_path):
    reference = Reference(**MODEL, world=2)
    reference.run(random_views(1, BATCH, SIZE, world=2))
    reference.save_checkpoint(tmp_path / "checkpoint.pth.tar", epoch=1)
    checkpoint = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert checkpoint.keys() == {"epoch", "arch", "state_dict", "optimizer"}
    state = checkpoint["state_dict"]
    assert {name.split(".")[0] for name in state} == {"module"}
    assert {name.split(".")[1] for name in state} == {"encoder_q", "encoder_k", "queue", "queue_ptr"}
    assert state["module.queue"].shape == (16, 16)
    assert state["module.queue_ptr"].shape == (1,)
    assert state["module.queue_ptr"].dtype == torch.int64
    assert {n.split("fc.")[1] for n in state if ".fc." in n} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    query = list(reference.model.encoder_q.parameters())
    optimizer = checkpoint["optimizer"]
    assert optimizer["param_groups"][0]["params"] == list(range(2 * len(query)))
    assert sorted(optimizer["state"]) == list(range(len(query)))
    for number, parameter in enumerate(query):
        assert optimizer["state"][number]["momentum_buffer"].shape == parameter.shape


def test_epsilon_zero_is_moco(two_steps):
    plain = Reference(**MODEL, world=2, method="moco", epsilon=0.0).run(two_steps)
    for method in ("ifm", "ifm_only"):
        found = errors(Reference(**MODEL, world=2, method=method, epsilon=0.0).run(two_steps), plain)
        assert max(found.values()) < 1e-12


def test_single_linear_head():
    names = set(ReferenceMoCo("resnet18", width=8, dim=16, queue_size=16, mlp=False).state_dict())
    assert {"encoder_q.fc.weight", "encoder_q.fc.bias", "encoder_k.fc.weight", "encoder_k.fc.bias"} <= names


def test_learning_rate():
    assert [learning_rate(0.03, e, 200, "step") for e in (0, 119, 120, 160)] == pytest.approx([0.03, 0.03, 3e-3, 3e-4])
    assert [learning_rate(0.03, e, 200) for e in (0, 100, 200)] == pytest.approx([0.03, 0.015, 0.0])
    with pytest.raises(ValueError, match="linear"):
        learning_rate(0.03, 0, 200, "linear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"method": "simclr"}, "simclr"), ({"mutations": frozenset({"typo"})}, "typo"), ({"world": 3}, "world 3")],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reference(**MODEL, **arguments).run(random_views(1, BATCH, SIZE))
