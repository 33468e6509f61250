"""SimCLR's PyTorch peer itself: emulated ranks against real processes, wrong variants seen."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from references.moco import random_views
from references.simclr import MUTATIONS, SimCLRReference
from tests.test_torch_reference import errors, one_thread, relative_error  # noqa: F401  (a fixture, for this module too)

pytestmark = pytest.mark.torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = {"arch": "resnet18", "width": 8, "dim": 16, "head": "hcl"}
LOSS = {"objective": "ifm", "temperature": 0.5, "epsilon": 0.1, "alpha": 0.5, "beta": 0.5, "tau_plus": 0.02}
LR = (0.03, 0.02)
BATCH = 8


@pytest.fixture(scope="module")
def one_step():
    return random_views(1, BATCH, 32, seed=5)


@pytest.fixture(scope="module")
def start():
    """The network that every test here starts with: drawn once."""
    return SimCLRReference(**MODEL).state()


@pytest.fixture(scope="module")
def baseline(start, one_step):
    return SimCLRReference(**MODEL, **LOSS, world=2, start=start, weight_decay=1e-2).run(one_step, LR[0])


def test_emulated_ranks_equal_two_processes(start, tmp_path):
    # 64 pixels: at 32 BatchNorm over a few values a channel makes much of a rounding.
    views = random_views(len(LR), BATCH, 64, seed=5)
    paths = {name: tmp_path / file for name, file in (("start", "a.pth"), ("views", "v.npz"), ("out", "out.npz"))}
    torch.save({name: torch.as_tensor(value) for name, value in start.items()}, paths["start"])
    np.savez(paths["views"], **views, lr=np.asarray(LR))
    flags = [f"--{name}={value}" for name, value in {**paths, **MODEL, "weight-decay": 1e-2, "world": 2}.items()]
    done = subprocess.run(
        [sys.executable, "-m", "references.simclr", *flags, f"--loss={json.dumps(LOSS)}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = SimCLRReference(**MODEL, **LOSS, world=2, start=start, weight_decay=1e-2).run(views, LR)
    with np.load(paths["out"]) as file:
        found = errors(ours, dict(file))
    assert {name: error for name, error in found.items() if not error <= 1e-10} == {}
    assert {"first/query", "first/key", "grad_norm", "acc1", "final/fc.1.running_mean"} <= found.keys()


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_wrong_variant_shows(mutation, start, one_step, baseline):
    options = {**MODEL, **LOSS, "world": 2, "start": start, "weight_decay": 1e-2}
    mutated = SimCLRReference(**options, mutations=frozenset({mutation})).run(one_step, LR[0])
    seen = [name for name in baseline if name in ("loss", "grad_norm") or name.endswith((".weight", ".running_var"))]
    assert max(relative_error(mutated[name], baseline[name]) for name in seen) > 1e-6


def test_nothing_asked_for_is_simclr(start, one_step):
    """The cross entropy, and the released form of hard negatives at next to no weight: the same step."""
    plain = SimCLRReference(**MODEL, objective="infonce", start=start).run(one_step)
    ifm = SimCLRReference(**MODEL, objective="ifm", epsilon=0.0, start=start).run(one_step)
    hard = SimCLRReference(**MODEL, objective="infonce", epsilon=0.0, tau_plus=1e-15, start=start).run(one_step)
    del plain["loss_ifm"]  # shifted, whatever is minimized
    for other in (ifm, hard):
        del other["loss_ifm"]
        assert max(errors(other, plain).values()) < 1e-10


def test_mistakes_are_named(start, one_step):
    with pytest.raises(ValueError, match="typo"):
        SimCLRReference(**MODEL, mutations=frozenset({"typo"}))
    with pytest.raises(ValueError, match="'mlp'"):
        SimCLRReference(head="mlp")
    with pytest.raises(ValueError, match="world 3"):
        SimCLRReference(**MODEL, start=start, world=3).run(one_step)
