"""The compile plan, without the compiler for TPUs: what it reads from programs, and what it makes of it."""

import dataclasses
import importlib.util
import json
import types

import jax
import pytest
from jax.experimental import topologies

from benchmarks import collectives, reporting, tpu_plan
from benchmarks.collectives import Collective
from benchmarks.tpu_plan import Compiled, Topology
from ifm_jax import assembly
from ifm_jax.errors import UsageError
from tests import small


def test_topologies():
    topology = Topology.parse("v5e:4x4")
    assert (topology.chip.name, topology.chips, str(topology)) == ("v5e", 16, "v5e:4x4")
    assert Topology.parse("v4:2x2x4").chips == 16
    # Two axes with two ends each; two rings; of three axes, two with ends (one of a single chip has no links).
    assert topology.bandwidth == 2 * 50e9
    assert Topology.parse("v5e:16x16").bandwidth == 4 * 50e9
    assert Topology.parse("v4:2x2x4").bandwidth == 4 * 45e9
    assert Topology.parse("v5p:2x2x1").bandwidth == 2 * 100e9
    for text in ("v5e", "v5e:4", "v4:4x4", "v9:4x4", "v5e:4x0", "v5e:4*4", ""):
        with pytest.raises(UsageError, match=rf"--topology={text.replace('*', '.')}: expected a chip and its axes"):
            Topology.parse(text)


# As libtpu writes them, shortened.
HLO = """
  %g.1 = u8[512,224,224,3]{2,1,3,0:T(32,128)(4,1)} all-gather(%p.1), channel_id=44, \
replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %g.2 = u8[512,224,224,3]{2,1,3,0:T(32,128)(4,1)} all-gather(%p.2), channel_id=44, \
replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %r.1 = (f32[1,64]{1,0:T(1,128)S(1)}, f32[1,64]{1,0:T(1,128)S(1)}) all-reduce(%b.1, %b.2), channel_id=9, \
replica_groups=mesh['axis_0'=8,'axis_1'=2,'axis_2'=1] {'axis_1'}, to_apply=%add
  %r.2 = f32[1,128]{1,0} all-reduce(%b.3), channel_id=10, replica_groups=[8,2]<=[16], to_apply=%add
  %e.1 = (f32[100]{0}, f32[1600]{0}) all-gather-start(%p.3), channel_id=11, replica_groups={}, dimensions={0}
  %d.1 = f32[1600]{0} all-gather-done(%e.1)
  %s.1 = bf16[32]{0} reduce-scatter(%p.4), channel_id=12, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %c.1 = (f32[50]{0}, f32[50]{0}) collective-permute-start(%p.5), channel_id=13, source_target_pairs={{0,1},{1,0}}
  %t.1 = f32[512]{0} get-tuple-element(%all-reduce.267), index=50
"""


def test_collectives_are_read_from_a_program():
    found = collectives.read(HLO, devices=16)
    assert found == [
        Collective("all-gather", "u8", 16, 1, 512 * 224 * 224 * 3, (512, 224, 224, 3)),  # two copies of one
        Collective("all-gather", "f32", 16, 1, 6400, (1600,)),
        Collective("all-reduce", "f32", 2, 2, 1024, (1, 128)),
        Collective("reduce-scatter", "bf16", 4, 1, 256, (32,)),
        Collective("collective-permute", "f32", 16, 1, 200, (50,)),
    ]
    topology = Topology.parse("v5e:4x4")
    images, _, statistics, _, permuted = (tpu_plan.exchange_seconds(one, topology) for one in found)
    assert images == pytest.approx(512 * 224 * 224 * 3 * 15 / 16 / 100e9)
    assert statistics == pytest.approx(2 * 1024 / 2 / 50e9)
    assert permuted == pytest.approx(200 / 50e9)


def test_an_exchange_of_all_with_all_counts_with_the_whole_array():
    """Of four devices, each with a part of it; also in the forms in which a program may write it."""
    groups = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
    forms = (
        f"%a = u8[4,25]{{1,0}} all-to-all(%p), {groups}",
        f"%a = ({', '.join(['u8[1,25]{1,0}'] * 4)}) all-to-all(%p, %q, %r, %s), {groups}",
        f"%a = ((u8[4,25]{{1,0}}), u8[4,25]{{1,0}}) all-to-all-start(%p), {groups}",
    )
    for form in forms:
        (found,) = collectives.read(form, devices=8)
        assert (found.kind, found.devices, found.count, found.bytes) == ("all-to-all", 4, 1, 400)


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    """Eight simulated devices in the place of a slice, the CPU's compiler in that of libtpu; an empty cache."""
    slice_ = types.SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: slice_)
    monkeypatch.setattr(tpu_plan, "require_libtpu", lambda: "0")
    monkeypatch.setenv("IFM_JAX_CACHE", str(tmp_path))
    return Topology.parse("v5e:2x4")


@pytest.mark.slow
def test_a_step_exchanges_nothing_but_what_it_must(simulated):
    """The uint8 images of the shuffle, the keys, gradients; and the plan of it, made once."""
    config = small.config(batch_size=64, moco__queue_size=512, model__bn_groups=8, data__source="folder:")
    config.data.augmentation, config.model.compute_dtype = "moco_v2", "float32"
    said = []
    row = tpu_plan.plan(config, simulated, images=640, say=said.append)
    assert row["steps"] == 20
    assert row["chips"] == 8
    assert row["hbm_fits"]
    # Every device updates all parameters, which counts in a step so small; one that computed the whole batch: 8.
    assert 1 < row["flops_over_ideal"] < 2
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(assembly.state_creator(config)).params))

    kinds = {}
    for one in row["collectives"]:
        kinds.setdefault(one["kind"], {})[one["dtype"]] = one
    gathers = kinds.pop("all-gather")
    assert (gathers["u8"]["count"], gathers["u8"]["bytes"]) == (1, 64 * 32 * 32 * 3)
    # The keys, once: back in order and for the queue.
    assert (gathers["f32"]["count"], gathers["f32"]["bytes"]) == (1, 64 * config.moco.dim * 4)
    assert gathers.keys() == {"u8", "f32"}
    reduced = sum(one["bytes"] for one in kinds.pop("all-reduce").values())
    assert 4 * parameters <= reduced < 4 * parameters * 1.5  # the gradient, once, and what is small beside it
    assert not kinds

    again = tpu_plan.plan(config, simulated, images=640, say=said.append)
    assert again == row
    assert [line.startswith("Using the stored compilation") for line in said] == [False, False, False, True]
    made = reporting.report("tpu_plan", [row], {})
    tpu_plan.print_report(made)


def test_fit_tries_what_can_be_trained(monkeypatch):
    """Multiples of 8 images a chip and of the groups, with a queue that they divide; the answer last."""
    config = small.config(batch_size=256, moco__queue_size=1000, model__bn_groups=24, data__source="folder:")
    config.data.augmentation = "moco_v2"
    topology = Topology.parse("v5e:2x4")

    def compile_step(config, topology, epoch_steps, say):
        return Compiled(1.0, 1.0, 1.0, config.batch_size * 2**20, None, 1.0, ())

    monkeypatch.setattr(tpu_plan, "compile_step", compile_step)
    *others, last = tpu_plan.fit(config, topology, images=1000, say=lambda line: None)
    assert others
    for row in (*others, last):
        assert row["batch_size"] % 192 == 0
        assert row["queue_size"] % row["batch_size"] == 0
        assert row["queue_size"] >= 1000
    assert last["hbm_fits"]
    assert 16384 / 1.125 - 192 <= last["batch_size"] <= 16384


def test_what_follows_from_a_compilation():
    topology = Topology.parse("v5e:4x4")
    gathered = Collective("all-gather", "u8", 16, 1, 16 * 10**8, (10**8,))
    compiled = Compiled(197e9, 196e9, 819e7, 12e9, None, 60.0, (gathered,))
    row = tpu_plan.summarize(compiled, topology, batch_size=512, steps=36_000)
    assert row["compute_seconds"] == pytest.approx(1e-3)
    assert row["memory_seconds"] == pytest.approx(10e-3)
    assert row["interconnect_seconds"] == pytest.approx(15e-3)
    assert row["flops_over_ideal"] == pytest.approx(197 / 196)
    assert row["hours_compute_bound"] == pytest.approx(0.01)
    assert row["hours_roofline"] == pytest.approx(0.15)
    assert row["hours_without_overlap"] == pytest.approx(0.26)
    assert row["images_per_second_roofline"] == pytest.approx(512 / 15e-3)
    assert row["hbm_fits"]
    assert row["hbm_free_bytes"] == 16 * 2**30 - 12e9
    json.dumps(row)
    full = dataclasses.replace(compiled, hbm_bytes=17.2e9)
    assert not tpu_plan.summarize(full, topology, 512, 1)["hbm_fits"]


def test_a_program_that_does_not_fit():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    used, limit = tpu_plan.out_of_memory(message)
    assert (used, limit) == (20.5 * 2**30, 15.75 * 2**30)
    earlier = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.01T) exceeds "
        "available HBM (15.75G)."
    )
    assert tpu_plan.out_of_memory(earlier) == (1.01 * 2**40, 15.75 * 2**30)
    assert tpu_plan.out_of_memory("INTERNAL: something else") is None
    refused = Compiled(0.0, 1.0, 0.0, used, limit, 60.0, ())
    row = tpu_plan.summarize(refused, Topology.parse("v5e:4x4"), 8192, 10)
    assert not row["hbm_fits"]
    assert row["hbm_free_bytes"] == (15.75 - 20.5) * 2**30
    assert "collectives" not in row


@pytest.mark.parametrize("start", [1, 128, 1024, 40_000])
@pytest.mark.parametrize(("fixed", "each"), [(0.1, 0.9 / 5000), (0.05, 1e-3), (0.0, 1e-2), (0.3, 1e-5)])
def test_the_largest_batch_that_fits(start, fixed, each):
    """Within an eighth (or a unit) of the largest there is, in few compilations."""
    tried = []

    def needed(batch):
        tried.append(batch)
        share = fixed + each * batch * (1.05 if batch > 2000 else 1.0)
        return share, share <= 1

    unit = 128
    found = tpu_plan.largest_batch(needed, unit, start)
    assert len(tried) <= 6
    assert all(batch % unit == 0 for batch in tried)
    best = max((batch for batch in range(unit, 100_000, unit) if fixed + each * batch * 1.05 <= 1), default=None)
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert needed(found)[1]
        assert found >= best / 1.125 - unit


def test_nothing_is_tried_that_cannot_be_trained():
    config = small.config(batch_size=16, moco__queue_size=64)
    with pytest.raises(UsageError, match=r"batch_size=16 is not a multiple of the 64 devices"):
        tpu_plan.plan(config, Topology.parse("v5e:8x8"), images=1000)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install():
    with pytest.raises(UsageError, match=r"pip install -e '.\[tpu-plan\]'"):
        tpu_plan.require_libtpu()
