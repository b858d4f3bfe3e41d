"""Compiling for TPUs on a CPU, and the report of tpu_report."""

import json
import pathlib
import sys

import pytest
from support.forked_programs import run_fork

from diffusion_tf.errors import InputError
from diffusion_tf.interop.tpu_compiler import compile_stablehlo, largest_batch
from diffusion_tf.interop.tpu_cycles import all_reduces, operations
from diffusion_tf.interop.tpu_projection import price, to_summary
from diffusion_tf.interop.tpu_slices import CHIPS, TOPOLOGIES, all_reduce_seconds, roofline_seconds

ROOT = pathlib.Path(__file__).parents[2]
V3, V5E = TOPOLOGIES["v3-8"], TOPOLOGIES["v5e-8"]


def matmul(m, k, n):
    a, b, c = (f"tensor<{rows}x{columns}xbf16>" for rows, columns in ((m, k), (k, n), (m, n)))
    return f"""module @matmul {{
      func.func @main(%a: {a}, %b: {b}) -> {c} {{
        %c = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : ({a}, {b}) -> {c}
        return %c : {c}
      }}
    }}"""


def test_slices_have_the_devices_and_memory_of_cloud_tpus():
    devices = {name: (slice_.num_devices, slice_.hbm_bytes / 2**30) for name, slice_ in TOPOLOGIES.items()}
    one_host = {"v2-8": (8, 8), "v3-8": (8, 16), "v4-8": (4, 32), "v5e-8": (8, 16), "v6e-8": (8, 32)}
    assert devices == {**one_host, "v3-32": (32, 16), "v5e-16": (16, 16)}


def test_the_roofline_uses_the_figures_of_one_device():
    assert roofline_seconds(61.5e12, 1, V3.chip) == pytest.approx(1)  # a core is half a chip
    assert roofline_seconds(1, 450e9, V3.chip) == pytest.approx(1)
    assert roofline_seconds(197e12, 2 * 819e9, V5E.chip) == pytest.approx(2)


def test_the_all_reduce_follows_ring_and_memory_bandwidth():
    # 7/8 of the bytes twice, over two directions of 50 GB/s each.
    assert all_reduce_seconds(8e9, V5E) == pytest.approx(2 * 7e9 / 100e9)
    # 3/4 of the bytes twice, over two directions of 656 Gbit/s each; five passes at 900 GB/s for the two cores.
    assert all_reduce_seconds(4e9, V3) == pytest.approx(2 * 3e9 / (2 * 82e9) + 20e9 / 900e9)


@pytest.mark.parametrize(
    ("limit", "start", "found", "tries"), [(100, 16, 96, 7), (16, 16, 16, 5), (5, 64, 5, 7), (1, 8, 1, 4), (0, 4, 0, 3)]
)
def test_the_largest_batch_is_found_to_an_eighth(limit, start, found, tries):
    tried = []
    assert largest_batch(lambda batch: tried.append(batch) or batch <= limit, start) == found
    assert len(tried) == tries == len(set(tried))


def test_a_matrix_product_has_exact_cost_and_memory():
    m, k, n = 2048, 4096, 1024
    compiled = compile_stablehlo(matmul(m, k, n), V3)
    assert compiled.error is None and compiled.compile_seconds > 0
    assert compiled.flops == 2 * m * n * k and compiled.hbm_bytes == 2 * (m * k + k * n + m * n)
    roofline = roofline_seconds(compiled.flops, compiled.bytes_accessed, V3.chip)
    assert 0.9 * roofline < compiled.estimated_seconds < 1.5 * roofline
    assert 0.9 * roofline < compiled.cycles / V3.chip.clock_hertz < 1.5 * roofline
    assert sum(op.cycles for op in compiled.operations) == compiled.cycles


def test_a_result_in_place_of_an_argument_takes_no_memory():
    side = 2048
    compiled = compile_stablehlo(matmul(side, side, side), V5E, in_place={1: 0})
    assert compiled.error is None and compiled.hbm_bytes < 3 * 2 * side**2


def test_a_program_that_does_not_fit_has_the_compilers_error():
    compiled = compile_stablehlo(matmul(65536, 65536, 65536), V3)
    assert compiled.error.startswith("RESOURCE_EXHAUSTED") and "exceeds available HBM" in compiled.error
    assert compiled.flops is None


def test_a_crash_of_the_compiler_is_an_error():
    assert "ended with code 1 and said: " in compile_stablehlo("no program", V3).error


def test_missing_packages_are_named(monkeypatch):
    for name in ("jax", "libtpu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs jax and libtpu: pip install '\.\[tpu-report\]'"):
        compile_stablehlo("", V3)


OPTIMISED = """HloModule m, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %inner = (s32[], f32[8]{0:T(256)}) fusion(%x), calls=%fused, metadata={op_name="while/conv"}, \
backend_config={"window_config":{"estimated_cycles":"30"}}
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%x, %y), backend_config={"window_config":{"estimated_cycles":"2"}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %outer = f32[8]{0:T(256)} fusion(%x), calls=%fused, backend_config={"window_config":{"estimated_cycles":"7"}}
  %loop = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  %sum = (f32[8,4]{1,0}, bf16[3]{0}, f32[]) all-reduce(%a, %b, %c), replica_groups={{0,1}}, to_apply=%add
  ROOT %r = f32[8]{0} get-tuple-element(%loop), index=1
}
""".replace("\\\n", "")


def test_cycles_are_those_of_executed_operations_and_loops_are_marked():
    found = {op.name: (op.cycles, op.loop) for op in operations(OPTIMISED)}
    assert found == {"outer": (7, False), "inner": (30, True), "less": (2, True)}
    inner = next(op for op in operations(OPTIMISED) if op.name == "inner")
    assert (inner.source, inner.result) == ("while/conv", "(s32[], f32[8])")


def test_an_all_reduce_has_the_bytes_of_all_its_arrays():
    assert all_reduces(OPTIMISED) == [8 * 4 * 4 + 3 * 2 + 4]


def test_the_price_of_a_run_is_that_of_all_chips_and_unknown_without_the_chips():
    assert price(10.0, "v3-8", {"v3": 2.0}) == 80 and price(10.0, "v5e-16", {"v5e": 1.5}) == 240
    assert (
        price(10.0, "v3-8", {"v5e": 2.0})
        is price(10.0, "v3-8", {"v3": None})
        is price(None, "v3-8", {"v3": 1.0})
        is None
    )


def test_the_table_leaves_empty_what_is_unknown():
    fits = {"error": None, "cycles": 1500, "steps_per_second": 2.0, "run_hours": 100.0, "price": None}
    sample = {"error": None, "cycles": 7, "all_steps_seconds": 9.5, "batch_size": 256}
    too_large = {"error": "RESOURCE_EXHAUSTED", "cycles": None, "batch_size": 256}
    table = to_summary(
        {
            "v3-8": {"train_step": fits, "sample": sample},
            "v2-8": {"train_step": too_large, "sample": sample},
        }
    )
    assert table.splitlines()[2:] == [
        "| v3-8 | yes | 1,500 | 2 | 100 |  | 256 | 7 | 9.5 |",
        "| v2-8 | no |  |  |  |  | 256 | 7 | 9.5 |",
    ]


def test_the_price_file_of_the_documentation_names_every_chip():
    assert set(json.loads((ROOT / "docs" / "tpu-prices.json").read_text())) == set(CHIPS)


@pytest.mark.slow
def test_the_report_bounds_the_speed_of_training_and_sampling(tmp_path):
    network = ["--ch=32", "--ch_mult=1", "--num_res_blocks=1", "--num_timesteps=50"]
    args = ["--dataset=digits", *network, "--batch_size=16", "--sample_batch_size=8", "--precision=bfloat16"]
    (tmp_path / "prices.json").write_text('{"v3": 2.5, "v6e": null}')
    args += ["--topology=v3-8", "--topology=v6e-8", "--start_ms=0.01", f"--prices={tmp_path}/prices.json", "--profile"]
    result = run_fork("tpu_report", *args, f"--out={tmp_path}/report.json")
    assert result.returncode == 0, result.stderr
    assert "v3-8: compiling train_step for 2 images a device" in result.stderr
    assert "Nothing ran on a TPU" in result.stdout and "steps/s, at most" in result.stdout
    assert "v3-8, sample: the operations with the most cycles" in result.stdout and "| v6e-8 | yes |" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    steps_per_loop = report["preset"]["steps_per_loop"]
    for name in ("v3-8", "v6e-8"):
        train, sample = (report["topologies"][name][what] for what in ("train_step", "sample"))
        for row in (train, sample):
            assert row["error"] is None and 0 < row["hbm_bytes"] < row["hbm_available_bytes"]
            least = row["cycles_seconds"] or row["estimated_seconds"] or 0.0
            least = max(least, row["roofline_seconds"])
            assert row["program_seconds"] == pytest.approx(least + row["all_reduce_seconds"])
            assert (row["cycles_seconds"] is None) == (name == "v6e-8")
            assert len(row["operations"]) == 10
        # The gradients of all weights and the loss, in float32.
        assert sum(train["all_reduce_bytes"]) > 4 * 100_000 and sample["all_reduce_bytes"] == []
        assert train["step_seconds"] == pytest.approx(max(train["program_seconds"], 1e-5) + 1e-5 / steps_per_loop)
        assert train["images_per_second"] == pytest.approx(16 * train["steps_per_second"])
        assert (sample["program_steps"], sample["calls"]) == (3, 17)
        assert sample["all_steps_seconds"] == pytest.approx(17 * (sample["program_seconds"] + 1e-5))
        assert (train["price"] is None) == (name == "v6e-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [f"--tpu_python={sys.base_prefix}/bin/python3"],
            "cannot lower train_step: ended with code 1 and said: Module",
        ),
        (["--attn_resolutions=5"], "tpu_report: --attn_resolutions=5 never occurs"),
    ],
)
def test_what_cannot_be_lowered_gives_one_line(args, message):
    result = run_fork("tpu_report", "--dataset=digits", *args)
    assert result.returncode == 1 and message in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology=v9-8"], "<v2-8|v3-8|v3-32|v4-8|v5e-8|v5e-16|v6e-8>"),
        (["--tpu_python=/no/python"], "/no/python is no program"),
        (["--topology=v4-8", "--batch_size=6"], "--batch_size=6 must be divisible by the 4 devices of v4-8"),
    ],
)
def test_bad_flags_give_one_line(args, message):
    result = run_fork("tpu_report", *args)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("tpu_report: ") and message in lines[0]
