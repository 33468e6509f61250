"""What the package uses of other libraries beyond their documented interface is still there, and is all there is."""

import ast
import importlib
import pathlib

import jax
import pytest
from jax.extend import core

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Names with an underscore that their libraries document.
_DOCUMENTED = {"os._exit"}
_KNOWN = {"jax._src.distributed": "ifm_jax/sharding.py"}


def test_no_private_name_is_used_but_the_known():
    """A new one takes a comment where it is used, and a check here."""
    found = {}
    for path in sorted((ROOT / "ifm_jax").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        found |= dict.fromkeys(private_names(ast.parse(path.read_text(encoding="utf-8"))), where)
    assert found == _KNOWN


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from jax._src import distributed as d", {"jax._src.distributed"}),
        ("import jax\njax._src.core.x", {"jax._src"}),
        ("import numpy as np\nnp.lib._format()", {"np.lib._format"}),
        ("import os\nos._exit(1)\nos.__name__", set()),
        ("class A:\n  def f(self, other): return self._x + other._x", set()),
    ],
)
def test_a_private_name_is_seen(code, expected):
    assert private_names(ast.parse(code)) == expected


def private_names(tree):
    """Returns the private names that a module takes from other libraries, with their modules."""
    names, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("ifm_jax"):
            modules |= {alias.asname or alias.name for alias in node.names}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            chain = ast.unparse(node)
            names |= {chain} if chain.partition(".")[0] in modules else set()
    return {name for name in names if any(map(is_private, name.split(".")))} - _DOCUMENTED


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_jax_coordinator_client():
    """`sharding` asks which process this is without starting devices, and compares what the processes were given."""
    from jax._src import distributed

    state = distributed.global_state
    assert state.process_id == 0, "sharding.process_index: the number of this process"
    assert state.client is None, "sharding._compare_num_processes: the client, None until the processes join"
    client = importlib.import_module("jaxlib._jax").DistributedRuntimeClient
    for name in ("key_value_set", "wait_at_barrier", "key_value_dir_get"):
        assert hasattr(client, name), f"sharding._compare_num_processes calls the client's {name}"


def test_jax_option_of_the_compilation_cache():
    """`assembly.configure_jax` leaves a cache alone that somebody has chosen; JAX has no type for its options."""
    assert hasattr(jax.config, "jax_compilation_cache_dir")


def test_jax_programs():
    """`runs.memory` walks the equations of a program for its convolutions; `jax.extend` promises nothing."""
    traced = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0)
    assert isinstance(traced, core.ClosedJaxpr)
    assert isinstance(traced.jaxpr, core.Jaxpr)
    (equation,) = traced.jaxpr.eqns
    assert isinstance(equation, core.JaxprEqn)
    assert equation.primitive.name == "jit"
    assert any(isinstance(value, core.ClosedJaxpr) for value in equation.params.values())
    assert equation.invars[0].aval.dtype == equation.outvars[0].aval.dtype


def test_tensorboardx_event_files(tmp_path):
    """`runs.tensorboard` writes events itself, without the thread of tensorboardX's `SummaryWriter`."""
    from ifm_jax.runs.tensorboard import TensorBoardLog

    with TensorBoardLog(tmp_path, last_step=3) as log:
        for name in ("write_event", "flush", "close"):
            assert hasattr(log._writer, name), f"TensorBoardLog calls {name} of tensorboardX's EventsWriter"
        log.write(4, {"loss": 1.0})
        log.write_histograms(4, {"similarity": ([0.0, 0.5, 1.0], [1, 2])})
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents."), "the name that TensorBoard looks for"
    assert b"train/loss" in path.read_bytes()
    assert b"similarity" in path.read_bytes()


def test_tfds_folders():
    """`data.tfds` looks for the features of a data set where TensorFlow Datasets would, before it imports them."""
    pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.utils import file_utils

    assert file_utils.list_data_dirs(), "data.tfds: the folders in which prepared data sets are looked for"
