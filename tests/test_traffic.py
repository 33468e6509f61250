"""Memory traffic counted from programs' text; and that of small training steps against a committed table."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import programs, proxies, traffic
from benchmarks.programs import Array
from ifm_jax.models import pooling

# As XLA writes them for a GPU, shortened.
GPU = """
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/ifm_jax/models/batch_norm.py"
2 "/home/me/ifm_jax/models/resnet.py"
3 "/home/me/ifm_jax/optim.py"
4 "/home/me/ifm_jax/models/convolution.py"

FunctionNames
1 "_statistics"
2 "BatchNorm.__call__"
3 "Bottleneck.__call__"
4 "_decay"
5 "_output"

FileLocations
1 {file_name_id=2 function_name_id=3 line=10 end_line=10 column=1 end_column=9}
2 {file_name_id=1 function_name_id=2 line=20 end_line=20 column=1 end_column=9}
3 {file_name_id=1 function_name_id=1 line=30 end_line=30 column=1 end_column=9}
4 {file_name_id=3 function_name_id=4 line=40 end_line=40 column=1 end_column=9}
5 {file_name_id=4 function_name_id=5 line=50 end_line=50 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=1}
5 {file_location_id=5 parent_frame_id=2}


%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_statistics (p.0: bf16[8,4,4,16], p.1: f32[100,16]) -> (f32[16], f32[16]) {
  %p.0 = bf16[8,4,4,16]{3,2,1,0} parameter(0)
  %p.1 = f32[100,16]{1,0} parameter(1)
  %wide = f32[8,4,4,16]{3,2,1,0} convert(%p.0), metadata={op_name="jit(step)/convert_element_type" stack_frame_id=2}
  %zero = f32[] constant(0)
  %first = f32[16]{0} reduce(%wide, %zero), dimensions={0,1,2}, to_apply=%add, \
metadata={op_name="jit(step)/reduce_sum" stack_frame_id=3}
  %row = f32[1,16]{1,0} slice(%p.1), slice={[3:4], [0:16]}
  %flat = f32[16]{0} bitcast(%row)
  ROOT %both = (f32[16]{0}, f32[16]{0}) tuple(%first, %flat)
}

%fused_enqueue (q.0: f32[100,16], q.1: f32[4,16], q.2: s32[]) -> f32[100,16] {
  %q.0 = f32[100,16]{1,0} parameter(0)
  %q.1 = f32[4,16]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %updated = f32[100,16]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %none)
}

%fused_transpose (t.0: bf16[8,4,4,16]) -> bf16[8,16,4,4] {
  %t.0 = bf16[8,4,4,16]{3,2,1,0} parameter(0)
  ROOT %turned = bf16[8,16,4,4]{3,2,1,0} transpose(%t.0), dimensions={0,3,1,2}
}

%body (state: (s32[], f32[16])) -> (s32[], f32[16]) {
  %state = (s32[], f32[16]{0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %value = f32[16]{0} get-tuple-element(%state), index=1
  %copied = f32[16]{0} copy(%value)
  ROOT %next = (s32[], f32[16]{0}) tuple(%number, %copied)
}

%condition (state: (s32[], f32[16])) -> pred[] {
  %state = (s32[], f32[16]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: bf16[8,8,8,3], w: bf16[16,3,3,3], queue: f32[100,16], keys: f32[4,16], at: s32[]) -> f32[16] {
  %x = bf16[8,8,8,3]{3,2,1,0} parameter(0)
  %w = bf16[16,3,3,3]{3,2,1,0} parameter(1)
  %queue = f32[100,16]{1,0} parameter(2)
  %keys = f32[4,16]{1,0} parameter(3)
  %at = s32[] parameter(4)
  %conv = (bf16[8,4,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3 stride=2x2 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(step)/conv_general_dilated" stack_frame_id=5}, backend_config={"x":{"y":"(]"}}
  %map = bf16[8,4,4,16]{3,2,1,0} get-tuple-element(%conv), index=0
  %statistics = (f32[16]{0}, f32[16]{0}) fusion(%map, %queue), kind=kInput, calls=%fused_statistics, \
metadata={op_name="jit(step)/reduce_sum" stack_frame_id=3}
  %mean = f32[16]{0} get-tuple-element(%statistics), index=0
  %enqueued = f32[100,16]{1,0} fusion(%queue, %keys, %at), kind=kLoop, calls=%fused_enqueue
  %turn = bf16[8,16,4,4]{3,2,1,0} fusion(%map), kind=kLoop, calls=%fused_transpose
  %decayed = f32[16]{0} multiply(%mean, /*index=1*/%mean), metadata={op_name="jit(step)/mul" stack_frame_id=4}
  %zero.1 = s32[] constant(0)
  %start = (s32[], f32[16]{0}) tuple(%zero.1, %decayed)
  %loop = (s32[], f32[16]{0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"x":1}
  ROOT %end = f32[16]{0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_of_a_gpu_program():
    found = {kernel.name: kernel for kernel in traffic.kernels(programs.parse(GPU))}
    assert list(found) == ["conv", "statistics", "enqueued", "turn", "decayed", "copied"]
    moved = {name: (kernel.reads, kernel.writes) for name, kernel in found.items()}
    x, w, a_map, vector = 2 * 8 * 8 * 8 * 3, 2 * 16 * 27, 2 * 8 * 16 * 16, 4 * 16
    assert moved == {
        "conv": (x + w, a_map),
        "statistics": (a_map + vector, 2 * vector),  # one row of the queue
        "enqueued": (4 * 4 * 16 + 4, 4 * 4 * 16),  # the new rows
        "turn": (a_map, a_map),
        "decayed": (vector, vector),  # the same operand twice
        "copied": (5 * vector, 5 * vector),
    }
    assert {name: kernel.source for name, kernel in found.items()} == {
        "conv": "convolutions",
        "statistics": "BatchNorm forward",
        "enqueued": "other",
        "turn": "other",
        "decayed": "optimizer",
        "copied": "copies",
    }
    assert found["conv"].opcode == "__cudnn$convForward"
    # Outputs at the border see two of three taps on one side: 11 of 12 pairs along each axis.
    assert found["conv"].operations == 2 * 8 * 16 * 3 * 11 * 11
    assert found["conv"].dtype == "bf16"
    assert {name for name, kernel in found.items() if kernel.transposes} == {"turn"}
    table = traffic.by_source(list(found.values()))
    assert table["convolutions"] == {"kernels": 1, "bytes": x + w + a_map}
    assert table["copies"] == {"kernels": 5, "bytes": 10 * vector}
    assert sum(row["bytes"] for row in table.values()) == sum(kernel.bytes for kernel in found.values())


# As libtpu writes them, shortened: arrays in the chip's own memory, tiles, asynchronous copies and slices.
TPU = """
HloModule jit_step, is_scheduled=true

%fused (p: f32[8,128], w: bf16[100,20]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %w = bf16[100,20]{0,1:T(8,128)(2,1)} parameter(1)
  %m = bf16[100,20]{0,1:T(8,128)(2,1)} negate(%w)
  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%p)
}

%async_computation (s.0: f32[64,128]) -> f32[8,128] {
  %s.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %piece = f32[8,128]{1,0:T(8,128)S(1)} slice(%s.0), slice={[0:8], [0:128]}
}

ENTRY %main (a: f32[64,128], b: f32[8,128], w: bf16[100,20]) -> f32[8,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %w = bf16[100,20]{0,1:T(8,128)(2,1)} parameter(2)
  %fetch = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%b)
  %slice-start = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) async-start(%a), \
calls=%async_computation
  %short = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:16]}
  %fetched = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %sliced = f32[8,128]{1,0:T(8,128)S(1)} async-done(%slice-start)
  %shortened = f32[16,128]{1,0:T(8,128)S(1)} slice-done(%short)
  %inner = f32[8,128]{1,0:T(8,128)S(1)} add(%fetched, %sliced), metadata={source_file="/x/ifm_jax/optim.py"}
  ROOT %out = f32[8,128]{1,0:T(8,128)} fusion(%inner, %w), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"1200"}
}
"""


def test_kernels_of_a_tpu_program():
    found = {kernel.name: kernel for kernel in traffic.kernels(programs.parse(TPU))}
    tile = 8 * 128 * 4
    assert {name: (kernel.reads, kernel.writes) for name, kernel in found.items()} == {
        "fetch": (tile, 0),
        "piece": (tile, 0),  # not the 64 rows that it is cut from
        "short": (2 * tile, 0),
        "inner": (0, 0),
        "out": (2 * 24 * 128, tile),  # 20 x 100 in tiles of 8 x 128
    }
    assert found["out"].cycles == 1200
    assert found["fetch"].source == "optimizer"  # it serves the sum
    assert found["short"].source == "other"


def test_arrays():
    a, b = programs.arrays("(bf16[2,3]{1,0}, (pred[5]{0:T(128)S(1)}, f32[]))")[:2]
    assert a == Array("bf16", (2, 3), (1, 0))
    assert (a.size, a.bytes) == (6, 12)
    assert b == Array("pred", (5,), (0,), (128,), 1)
    assert b.bytes == 128
    assert [array.dtype for array in programs.arrays("(token[], f8e4m3fn[4])")] == ["token", "f8e4m3fn"]
    with pytest.raises(ValueError, match="no program"):
        programs.parse("HloModule empty\n")


@pytest.mark.parametrize(
    ("stride", "pad", "taps", "groups"), [(1, 1, 3, 1), (2, 1, 3, 1), (2, 3, 7, 1), (2, 0, 1, 1), (1, 1, 3, 2)]
)
def test_operations_are_those_that_xla_counts(stride, pad, taps, groups):
    """Of a convolution and its two gradients, as written."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 15, 14, 6), (taps, taps, 6 // groups, 8)))

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            *(x, kernel, (stride, stride), ((pad, pad), (pad, pad))),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    y = jax.eval_shape(convolution, x, kernel)
    functions = (
        lambda x, kernel, y: convolution(x, kernel),
        lambda x, kernel, y: jax.vjp(lambda x: convolution(x, kernel), x)[1](y)[0],
        lambda x, kernel, y: jax.vjp(lambda kernel: convolution(x, kernel), kernel)[1](y)[0],
    )
    for function in functions:
        lowered = jax.jit(function).lower(x, kernel, y)
        assert traffic.operations(programs.parse(lowered.as_text("hlo"))) == lowered.cost_analysis()["flops"]


def test_traffic_and_sources_of_a_compiled_program():
    """Bytes are XLA's own count where nothing is sliced; sources are told by who called."""
    x = jax.ShapeDtypeStruct((4, 8, 8, 16), jnp.float32)

    def loss(x, w):
        y = pooling.max_pool(x).reshape(4, -1) @ w
        return jnp.sum(jnp.square(y))

    lowered = jax.jit(jax.grad(loss)).lower(x, jax.ShapeDtypeStruct((4 * 4 * 16, 10), jnp.float32))
    compiled = lowered.compile()
    kernels = traffic.kernels(programs.parse(compiled.as_text()))
    assert sum(kernel.bytes for kernel in kernels) == pytest.approx(
        compiled.cost_analysis()["bytes accessed"], rel=0.02
    )
    assert sum(kernel.operations for kernel in kernels) == 2 * 2 * 4 * 256 * 10
    assert {"pooling"} <= {kernel.source for kernel in kernels}
    assert traffic.operations(programs.parse(lowered.as_text("hlo"))) == 2 * 2 * 4 * 256 * 10


def test_the_guard_says_what_grew():
    before = {
        "bytes": 1000,
        "kernels": 100,
        "sources": {"convolutions": {"bytes": 600, "kernels": 50}, "loss": {"bytes": 400, "kernels": 50}},
        "collectives": {"all-reduce f32": {"count": 1, "bytes": 100}},
    }
    assert proxies.worse(before, before) == []
    found = {
        "bytes": 1020,
        "kernels": 104,
        "sources": {"convolutions": {"bytes": 500, "kernels": 50}, "loss": {"bytes": 520, "kernels": 54}},
        "collectives": {"all-reduce f32": {"count": 1, "bytes": 100}, "all-gather u8": {"count": 1, "bytes": 5}},
    }
    assert proxies.worse(found, before) == [
        "kernels of the step: 104 instead of 100 (+4.0%)",
        "bytes of loss: 520 instead of 400 (+30.0%)",
        "all-gather u8, number: 1 instead of 0 (new)",
        "all-gather u8, bytes: 5 instead of 0 (new)",
    ]
    assert proxies.worse(before, found) == ["bytes of convolutions: 600 instead of 500 (+20.0%)"]


def test_the_table_is_of_the_pinned_jax():
    """Otherwise the comparison is left out everywhere."""
    pinned = (proxies.TABLE.parents[2] / "requirements.txt").read_text().split()
    table = proxies.read_table()
    assert f"jax=={table['jax']}" in pinned, f"renew the table with the pinned version of JAX: {proxies.RENEW}"
    assert {str(proxy) for proxy in proxies.PROXIES if proxy.platform == "cpu"} <= set(table["programs"])


@pytest.mark.slow
@pytest.mark.parametrize("proxy", proxies.PROXIES, ids=str)
def test_a_step_moves_no_more_than_before(proxy, own_names):
    """Bytes, kernels and collectives of small steps, as compiled, within 3 % of the committed table."""
    table = proxies.read_table()
    if table["jax"] != jax.__version__:
        pytest.skip(f"the table is of jax {table['jax']}, this is {jax.__version__}: {proxies.RENEW}")
    if not proxies.can_compile(proxy.platform):
        pytest.skip(f"no compiler for {proxy.platform} is installed")
    if str(proxy) not in table["programs"]:
        pytest.skip(f"the table was made without a compiler for {proxy.platform}: {proxies.RENEW}")
    found = proxies.count(proxy, proxies.compile_proxy(proxy).as_text())
    worse = proxies.worse(found, table["programs"][str(proxy)])
    assert not worse, f"{'; '.join(worse)}. If that is worth it, renew the table: {proxies.RENEW}"
