"""docs/methods.md: the method written there trains, on one device and on several."""

import pathlib
import re

import jax
import numpy as np
import pytest

from ifm_jax import pretrain, sharding

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs" / "methods.md"


@pytest.mark.slow
def test_the_method_of_the_docs_trains():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {"__name__": "docs"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have it
        for block in blocks:
            exec(compile(block, str(DOCS), "exec"), names)
        history = names["history"]
        assert history[-1] < history[0] - 0.1
        mesh = sharding.make_mesh(jax.devices()[:2])
        method = names["AlignAndSpread"](names["encoder"], mesh=mesh)
        step = pretrain.PretrainStep(method, names["step"].optimizer, names["step"].augment)
        state = pretrain.create(jax.random.key(0), method, step.optimizer)
        state = jax.device_put(state, pretrain.placements(mesh, method))
        batch = sharding.put_batch(mesh, jax.device_get(names["batch"]))
        _, metrics = step.jit(rates=False)(state, batch, sharding.place_key(mesh, jax.random.key(2)))
    np.testing.assert_allclose(metrics["loss"], history[0], rtol=1e-4)
