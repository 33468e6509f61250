"""The loop: calls of one or of several steps, the lines of metrics, what may not happen between two steps."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifm_jax.errors import RunError
from ifm_jax.runs import loop
from ifm_jax.runs.metrics_log import MetricsLog
from ifm_jax.runs.progress import Silence
from ifm_jax.runs.tensorboard import TensorBoardLog


@jax.jit
def advance(state, batch):
    """Up to five steps; what is beyond the call's is 0."""
    done = state + 1 + jnp.arange(5)
    return state + batch["steps"], {"loss": jnp.where(jnp.arange(5) < batch["steps"], done, 0).astype(jnp.float32)}


def run(tmp_path, most, last_step, log_every, step_fn=advance, **options):
    """Returns the lines of metrics, and the states saved."""
    saved = []
    counts = loop.counts(0, last_step, most, options.get("checkpoint_every", 1000), options.get("evaluate_every", 0))
    calls = (loop.Call(jax.device_put({"steps": np.int32(count)}), count) for count in counts)
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log, TensorBoardLog(tmp_path / "tensorboard", 0) as tensorboard:
        recorder = loop.Recorder(log, tensorboard, Silence(), 8, 10, log_every, tmp_path / "curves.png")
        options = {"checkpoint_every": 1000} | options
        stop = loop.StopSignals(Silence())
        fixed = {"first": 0, "last_step": last_step, "recorder": recorder, "stop": stop}
        state = jax.device_put(np.int32(0))
        loop.run(step_fn, state, calls, save=lambda state: saved.append(int(state)), **fixed, **options)
    return [json.loads(line) for line in path.read_text().splitlines()], saved


@pytest.mark.parametrize(("most", "every", "last"), list(itertools.product((1, 3, 7), (4, 10), (5, 20))))
def test_calls_end_where_something_is_due(most, every, last):
    counts = list(loop.counts(2, last, most, every, 0, 6))
    ends = [2 + end for end in itertools.accumulate(counts)]
    assert ends[-1] == last
    assert max(counts) <= most
    assert {step for step in range(3, last + 1) if step % every == 0 or step % 6 == 0} <= set(ends)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_lines_and_checkpoints_do_not_depend_on_the_calls(tmp_path, most):
    lines, saved = run(
        *(tmp_path, most, 23, 2),
        checkpoint_every=5,
        evaluate=lambda state: {"found": int(state)},
        evaluate_every=9,
    )
    # Every second step, both evaluations, the last step; what a step found is in its own line.
    assert [line["step"] for line in lines] == [*range(2, 9, 2), 9, *range(10, 23, 2), 23]
    assert all(line["loss"] == line["step"] and line["epoch"] == line["step"] / 10 for line in lines)
    assert {line["step"]: line["found"] for line in lines if "found" in line} == {9: 9, 18: 18}
    assert saved == [5, 10, 15, 20, 23]


def test_a_loss_that_is_not_finite_is_found_within_a_call(tmp_path):
    @jax.jit
    def fails(state, batch):
        state, found = advance(state, batch)
        return state, {"loss": jnp.where(found["loss"] == 8, jnp.nan, found["loss"])}

    with pytest.raises(RunError, match="loss is nan at step 8"):
        run(tmp_path, 5, 23, 2, fails, checkpoint_every=5)


def test_nothing_is_sent_to_the_device_unasked(tmp_path):
    """A step that is called with an array of the host's would wait for its transfer, every time."""
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path, 1, 3, 1, lambda state, batch: advance(state, {"steps": np.ones(1, np.int32)}))
