"""SimCLR against PyTorch, step for step, and as a whole run."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifm_jax import optim, pretrain, sharding
from ifm_jax.errors import UsageError
from ifm_jax.methods import Objective, SimCLR
from ifm_jax.models import Encoder
from ifm_jax.models.resnet import ARCHITECTURES
from ifm_jax.runs import loading, metrics_log, training
from ifm_jax.runs.workdir import Workdir
from ifm_jax.torch_interop import names, replay, writing
from ifm_jax.torch_interop.description import describe
from references import moco, simclr
from tests import small

DIM, N, STEPS, WIDTH = 16, 8, 5, 8
SIZE = 33  # the fewest pixels that leave four positions to the last stage
HARD = {"objective": "ifm", "epsilon": 0.1, "alpha": 0.5, "beta": 1.0, "tau_plus": 0.1}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("head", "loss", "devices"),
    [("simclr", {"objective": "infonce"}, 2), ("hcl", HARD, 1)],
)
def test_follows_torch(head, loss, devices):
    """Five steps of two ranks with their own BatchNorm: losses, gradient norm, parameters, statistics."""
    views = moco.random_views(steps=STEPS, n=N, size=SIZE)
    reference = simclr.SimCLRReference("resnet18", DIM, head, width=WIDTH, world=2, temperature=0.5, **loss)
    start = {name: np.asarray(value) for name, value in reference.state().items()}
    expected = reference.run(views, lr_per_step=0.03)

    options = dict(loss)
    objective = Objective(options.pop("objective"), temperature=0.5, **options)
    named = {"simclr": "mlp", "hcl": "hcl"}[head]
    wide = {"compute_dtype": "float64", "param_dtype": "float64"}
    mesh = sharding.make_mesh(jax.devices()[:devices])
    method = SimCLR(Encoder("resnet18", DIM, named, width=WIDTH, bn_groups=2, **wide), objective, mesh)
    table = [
        *names.backbone_table(ARCHITECTURES["resnet18"]._replace(width=WIDTH)),
        *names.head_table(8 * WIDTH, DIM, named),
    ]
    trees = {"params": {}, "batch_stats": {}}
    for entry in table:
        value = names.to_jax_layout(start[entry.torch], entry.kind)
        names.set_(trees[entry.collection], entry.path, jnp.array(value))
    step = pretrain.PretrainStep(method, optim.make("sgd", 0.9, 1e-4), augment=lambda rngs, images: images)
    state = pretrain.TrainState(
        jnp.zeros((), jnp.int32), *trees.values(), step.optimizer.init(trees["params"]), memory=()
    )
    state = jax.device_put(state, pretrain.placements(mesh, method))
    rest = sharding.place_key(mesh, jax.random.key(0)), jax.device_put(np.full(STEPS, 0.03), sharding.replicated(mesh))
    program, series = None, []
    for number in range(STEPS):
        batch = sharding.put_batch(
            mesh, {"views": np.stack([views[name][number] for name in ("query", "key")], axis=1)}
        )
        if program is None:  # optimized: what the library lacks in float64 is a plain loop
            program = step.jit().lower(state, batch, *rest).compile({"xla_backend_optimization_level": 1})
        state, found = program(state, batch, *rest)
        series.append(jax.device_get(found))
    for name in ("loss", "loss_clean", "loss_ifm", "grad_norm"):
        ours = [found[name] for found in series]
        np.testing.assert_allclose(ours, expected[name], rtol=1e-9, err_msg=name)
    trees = {"params": state.params, "batch_stats": state.batch_stats}
    for entry in table:
        values = names.to_torch_layout(np.asarray(names.get(trees[entry.collection], entry.path)), entry.kind)
        theirs = expected[f"final/{entry.torch}"]
        np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max(), err_msg=entry.torch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of eight steps with hard negatives."""
    workdir = tmp_path_factory.mktemp("simclr")
    training.train(config(), workdir, devices=jax.devices()[:1], quiet=True)
    return workdir


def config(**fields):
    return small.config(method="simclr", simclr__dim=8, hard__beta=0.5, **fields)


@pytest.mark.slow
def test_a_run_goes_on_as_if_uninterrupted(run, tmp_path):
    for steps in (3, 0):
        training.train(config(steps=steps), tmp_path, devices=jax.devices()[:1], quiet=True)
    ours, theirs = (small.without_speed(metrics_log.read(path / "metrics.jsonl")) for path in (tmp_path, run))
    assert ours == theirs
    small.assert_same(*(loading.read(path).state for path in (tmp_path, run)))


@pytest.mark.slow
def test_what_is_moco_s_alone_says_so(run, tmp_path):
    with pytest.raises(UsageError, match=r"--for=moco: .* method=simclr, .* expected --for=torchvision"):
        writing.to_torch(run, tmp_path / "a.pth.tar")
    writing.to_torch(run, tmp_path / "a.pth", "torchvision")
    assert loading.read(tmp_path / "a.pth").config.model.arch == "resnet8"
    views = {name: np.zeros((1, 8, 32, 32, 3)) for name in ("query", "key")}
    with pytest.raises(UsageError, match="has method=simclr: replay follows the original: expected method=moco"):
        replay.replay(config(), loading.read(run), views)
    assert describe(loading.read(run))["parts"].startswith("query encoder")


@pytest.mark.slow
def test_moco_starts_with_its_weights_and_the_other_way_round(run, tmp_path, capsys):
    """Across methods the network is used, and what is a method's own is new."""
    training.train(small.config(steps=1, init_from=str(run)), tmp_path / "moco", devices=jax.devices()[:1])
    said = capsys.readouterr().out
    assert "query encoder; key encoder (a copy of the query encoder); a new queue" in said
    training.train(config(steps=1, init_from=str(tmp_path / "moco")), tmp_path / "back", devices=jax.devices()[:1])
    assert "Starting with" in capsys.readouterr().out
    assert Workdir(tmp_path / "back").read_config().method == "simclr"
    assert pathlib.Path(tmp_path / "back" / "checkpoints" / "1").is_dir()
