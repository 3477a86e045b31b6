"""The benchmark of guided_step runs, its baselines do the same job, its checks find mistakes, its report reads it."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import baselines, report
from bench import test_guided_step as suite
from genarm_kernels import available_backends, guided_log_softmax, guided_step
from genarm_kernels.backends import interpreted
from genarm_kernels.testing import make_logits, pooled_chi_squared

REPOSITORY = Path(__file__).parents[2]
INTERPRETER = "triton" in available_backends() and interpreted("triton")
TAKES_SECONDS = pytest.mark.slow  # torch.compile calls a C++ compiler
BASELINES = [pytest.param(name, marks=[TAKES_SECONDS] if name == "compiled" else []) for name in baselines.BASELINES]
FILTERS = list(suite.FILTERS.values())


@pytest.fixture(autouse=True)
def compiler(request):
    if "compiled" in request.node.name and (reason := baselines.why_not_compiled("cpu")):
        pytest.skip(reason)


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(suite, "_MAX_POOL", 1 << 20)
    monkeypatch.setattr(suite, "DEVICE", "cpu")
    return suite.Case(vocab=1000, batch=3, arms=2, filters="k+p+min-p", logits="peaked")


def test_the_loop_s_parts_can_be_timed():
    """Every benchmark of `bench/test_decoder.py` once; it checks what it times."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "bench/test_decoder.py"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("chosen", ["not compiled", pytest.param("", marks=TAKES_SECONDS, id="and compiled")])
def test_benchmark_and_its_report(tmp_path, chosen):
    """The whole of `make bench`, on one tiny case."""
    raw = tmp_path / "raw.json"

    def python(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        # With it pytest-benchmark takes the process for a worker of the tests', and times nothing.
        environment = os.environ | {"GENARM_BENCH_GRID": "tiny", "GENARM_BENCH_DEVICE": "cpu"}
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python(
        "pytest", "bench/test_guided_step.py", "-q", "-p", "no:cacheprovider", "-k", chosen, f"--benchmark-json={raw}"
    )
    table = python("bench.report", raw, "--out", tmp_path / "results")

    subjects = {row["extra_info"]["subject"] for row in json.loads(raw.read_text())["benchmarks"]}
    wanted = {"eager", "transformers", *(name for name in available_backends() if name != "triton")}
    assert wanted <= subjects
    assert "peaked rows, filters: k+p+min-p" in table
    assert any(line.split()[1:6:2] == ["1000", "2", "1"] for line in table.splitlines())
    assert "targets, backend" in table

    folder = tmp_path / "results" / "cpu"
    assert sorted(path.name for path in folder.iterdir()) == ["guided_step.json", "guided_step.png"]
    picture = (folder / "guided_step.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    kept = json.loads((folder / "guided_step.json").read_text())
    assert {"machine", "threads", "torch", "transformers", "commit", "read_gb_s"} <= kept.keys()
    peaked, flat = kept["cases"]
    assert (peaked["vocab"], peaked["batch"], peaked["arms"], peaked["logits"]) == (1000, 2, 1, "peaked")
    assert flat["logits"] == "flat"
    median, p20, p80 = peaked["eager"]
    assert 0 < p20 <= median <= p80


def test_the_parts_of_the_loop_can_be_timed():
    """bench/test_decoder.py, each part once."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-disable",
        "bench/test_decoder.py",
    ]
    environment = os.environ | {"PYTEST_XDIST_WORKER": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "11 passed" in done.stdout, done.stdout + done.stderr


def test_grid_is_the_documented_one():
    cases = {(case, subject) for case, subject in (parameters.values for parameters in suite.grid())}
    full = 4 * 3 * 3 * 4 * 2
    for name in suite.serving():
        assert sum(subject == name for _, subject in cases) == (4 * 4 if name == "reference" else full)
    for name, batches in {"eager": {1, 8, 64}, "transformers": {1, 8, 64}, "compiled": {8}}.items():
        of_name = {case for case, subject in cases if subject == name}
        assert {case.batch for case in of_name} == batches
        assert len(of_name) == 4 * 4 * len(batches)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_log_probabilities_are_the_reference_s(name, filters):
    """At the token that it drew: of the draw itself, of the base and of each ARM."""
    base, *arms = (make_logits("peaked", (4, 1000), seed=seed) for seed in (1, 2, 3))
    guidance = {"weights": [0.7, -0.4], "temperature": 0.8}
    drawn = baselines.BASELINES[name](base, arms, **guidance, **filters)
    law = guided_step(base, arms, **guidance, **filters, backend="reference")
    at_token = drawn.token[:, None]
    logp = guided_log_softmax(base, arms, **guidance, backend="reference").gather(1, at_token)[:, 0]
    own = torch.cat([x.double().log_softmax(1).gather(1, at_token) for x in (base, *arms)], 1).float()
    torch.testing.assert_close(drawn.logprob, logp - law.log_mass, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn.own_logprobs, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_baseline_filters_keep_what_the_reference_keeps(filters):
    """Rows without ties: with ties, baselines cut between equals."""
    base, arm = (make_logits("peaked", (4, 1000), seed=seed) for seed in (4, 5))
    law = guided_step(base, [arm], weights=0.7, temperature=0.8, **filters, backend="reference")
    parameters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    p, _ = baselines.eager_filtered((base + 0.7 * arm) / 0.8, **parameters)
    assert (p > 0).sum(1).tolist() == law.kept.tolist()
    scores = baselines.pipeline_scores([base.log_softmax(1), arm.log_softmax(1)], [0.7], 0.8, **parameters)
    assert scores.isfinite().sum(1).tolist() == law.kept.tolist()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_draws_from_the_reference_s_distribution(name, filters):
    torch.manual_seed(0)
    draws, vocab = 20_000, 60
    base, arm = (make_logits("normal", (1, vocab), seed=seed) for seed in (6, 7))
    drawn = baselines.BASELINES[name](
        base.expand(draws, -1).contiguous(), [arm.expand(draws, -1).contiguous()], [0.7], 0.8, **filters
    )
    kept = guided_step(base, [arm], weights=0.7, temperature=0.8, **filters, backend="reference").kept.item()
    p = guided_log_softmax(base, [arm], weights=0.7, temperature=0.8, backend="reference")[0].exp()
    p = torch.where(p >= p.topk(kept).values[-1], p, 0.0)
    assert pooled_chi_squared(drawn.token.bincount(minlength=vocab), p) > 0.001 / (len(FILTERS) * len(BASELINES))


def outcome(case, subject, **changes):
    """Of the case's own inputs, with parameters changed."""
    base, arms = suite.first_rows(case)
    sampling = case.sampling | changes
    if subject in baselines.BASELINES:
        return baselines.BASELINES[subject](base, arms, **sampling)
    return guided_step(base, arms, backend=subject, **sampling)


@pytest.mark.parametrize("subject", ["eager", "transformers", *available_backends()])
def test_the_benchmark_s_check_passes_what_is_right(case, subject, monkeypatch):
    if subject in available_backends() and subject not in suite.serving():
        pytest.skip(f"{subject} does not serve the CPU")
    suite.check(case, outcome(case, subject))
    flat = dataclasses.replace(case, logits="flat", filters="p=0.9", batch=9)
    suite.check(flat, outcome(flat, subject))


@pytest.mark.parametrize("subject", ["eager", "transformers", "reference"])
@pytest.mark.parametrize(
    ("filters", "mistake"),
    [
        ("none", {"temperature": 0.9}),
        ("none", {"weights": [0.7, 0.6]}),
        ("k=50", {"top_k": 0}),
        ("k=50", {"top_k": 25}),
        ("p=0.9", {"top_p": 1.0}),
        ("k+p+min-p", {"top_p": 1.0}),
        ("k+p+min-p", {"min_p": 0.3}),
    ],
    ids=str,
)
def test_the_benchmark_s_check_finds_a_wrong_parameter(case, subject, filters, mistake):
    case = dataclasses.replace(case, filters=filters)
    with pytest.raises(AssertionError, match="V=1000 B=3 N=2"):
        suite.check(case, outcome(case, subject, **mistake))


@pytest.mark.parametrize("field", ["token", "kept", "status", "logprob", "log_mass", "base_logprob", "arm_logprobs"])
def test_the_benchmark_s_check_finds_a_wrong_field(case, field):
    right = outcome(case, "reference")
    wrong = getattr(right, field).clone()
    wrong[1] += 1
    with pytest.raises(AssertionError, match=field):
        suite.check(case, right._replace(**{field: wrong}))


def test_the_benchmark_s_check_finds_rewards_of_another_token(case):
    drawn = outcome(case, "eager")
    with pytest.raises(AssertionError, match="own_logprobs"):
        suite.check(case, drawn._replace(own_logprobs=drawn.own_logprobs.roll(1, 1)))


def raw_rows(path, microseconds):
    """A file as pytest-benchmark writes it: {(V, B, filters, logits, subject): median}."""
    rows = [
        {
            "stats": {"median": median / 1e6},
            "extra_info": dict.fromkeys(report.ENVIRONMENT, "?")
            | {"read_gb_s": 30.0, "p20": median / 1e6, "p80": median / 1e6, "arms": 1, "bytes": 4 * vocab * batch}
            | {"vocab": vocab, "batch": batch, "filters": filters, "logits": logits, "subject": subject},
        }
        for (vocab, batch, filters, logits, subject), median in microseconds.items()
    ]
    path.write_text(json.dumps({"benchmarks": rows}))
    return path


def test_report_judges_the_targets(tmp_path):
    run = report.read(
        raw_rows(
            tmp_path / "raw.json",
            {
                (128256, 8, "p=0.9", "peaked", "cpu"): 100.0,
                (128256, 8, "p=0.9", "peaked", "transformers"): 15_100.0,
                (128256, 8, "p=0.9", "flat", "cpu"): 410.0,
                (128256, 8, "k=50", "peaked", "cpu"): 100.0,
                (128256, 8, "k=50", "peaked", "reference"): 90_000.0,
                (128256, 8, "k=50", "peaked", "transformers"): 4_900.0,
                (1, 1, "none", "peaked", "cpu"): 19.0,
                (1, 1, "none", "peaked", "reference"): 900.0,
            },
        )
    )
    assert run.ours == "cpu"
    verdicts = {target.text: (target.measured, target.verdict) for target in report.targets(run)}
    assert verdicts == {
        "V=128256 B=8 p=0.9: times faster than transformers": (pytest.approx(151), "holds"),
        "V=128256 B=8 k=50: times faster than transformers": (pytest.approx(49), "FAILS"),
        "V=128256 B=8 none: times faster than transformers": (None, "not measured"),
        "V=32000 B=1 p=0.9: times faster than transformers": (None, "not measured"),
        "V=1 B=1 N=1: microseconds a call from Python": (pytest.approx(19), "holds"),
        "flat rows: times slower than peaked ones, the worst case (V=128256 B=8 N=1 p=0.9)": (
            pytest.approx(4.1),
            "FAILS",
        ),
    }
    key = ("peaked", "p=0.9", 128256, 8, 1)
    assert run.gb_s(key) == pytest.approx(4 * 128256 * 8 / 100e-6 / 1e9)
    assert run.percent(key) == pytest.approx(run.gb_s(key) / 30 * 100)


def test_report_names_a_file_without_times(tmp_path):
    with pytest.raises(SystemExit, match="no timed case"):
        report.read(raw_rows(tmp_path / "raw.json", {}))


def test_gpu_kernels_without_a_gpu(tmp_path, monkeypatch, capsys):
    """The GPU benchmark's way from cases to files, its clock replaced: every case is checked, failures are shown."""
    from bench import gpu_kernels

    def time_of(case, step):
        if case.filters == "p=0.9" and case.cache == "warm":
            raise RuntimeError("planted")
        base, arms = gpu_kernels.inputs(case, 1)[0]
        step(base, arms, 0)
        return gpu_kernels.Time(case.batch, 1.0, 2.0)

    for name, value in {
        "VOCABS": (1500,), "MAIN_VOCAB": 1500, "BATCHES": (1, 64), "ARMS": (1,), "DEVICE": "cpu", "time_of": time_of,
        "copy_bandwidth": lambda: 4000.0, "call_time": lambda name: 33.0, "compiled": gpu_kernels.eager,
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu_kernels, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA None")
    checked = []
    monkeypatch.setattr(gpu_kernels, "available_backends", lambda: ("reference", "triton"))
    monkeypatch.setattr(gpu_kernels, "check", lambda case, step: checked.append(case))
    monkeypatch.setattr(gpu_kernels, "_ours", lambda name, sampling, *step: None)
    monkeypatch.setattr("sys.argv", ["gpu_kernels", "--out", str(tmp_path)])
    assert gpu_kernels.main() == 1

    kept, shown = json.loads((tmp_path / "kernels.json").read_text()), capsys.readouterr().out
    assert len(kept["cases"]) == len(checked) == 2 * 2 * 4 * 2 + 2 * 2 * 2 * 2
    assert [case["mask"] for case in kept["cases"] if case["mask"] != "none"] == ["tiles"] * 8 + ["scattered"] * 8
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert kept["device"] == "NVIDIA None" and kept["call_us"] == {"triton": 33.0}
    failed = [case for case in kept["cases"] if "triton" not in case]
    assert failed and all(case["filters"] == "p=0.9" and case["cache"] == "warm" for case in failed)
    assert "RuntimeError: planted" in shown and f"{len(failed)} cases failed on a backend of ours" in shown
    assert "triton none B=1: us: 1 (bound 9) holds" in shown and "triton none B=64: us: 64 (bound 14) MISSED" in shown
    assert "triton none B=256: us: None (bound 42) not measured" in shown
    assert "times faster than eager: 1.0 (bound 20) MISSED" in shown


@pytest.mark.parametrize("mask", ["tiles", "scattered"])
def test_a_masked_step_is_checked(mask, monkeypatch):
    """The mask takes out about half of the tokens, its bytes count, and the check holds a backend to it."""
    from bench import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "DEVICE", "cpu")
    case = gpu_kernels.Case(5000, 8, 1, "k+p", "peaked", "cold", mask)
    assert case.bytes_read == 2 * 2 * 8 * 5000 + 8 * 4 * 157 and not case.at_main_shape
    words = gpu_kernels.token_mask(case)
    allowed = (words[:, :, None] >> torch.arange(32) & 1).flatten(1)[:, :5000].bool()
    if mask == "tiles":
        assert all(tile.unique(dim=1).shape[1] == 1 for tile in allowed.split(1024, 1))
    else:
        assert 0.3 < allowed[:, :1024].float().mean() < 0.7 and (allowed[0] != allowed[1]).any()
    assert 0.4 < allowed.float().mean() < 0.65

    def step(sampling):
        return lambda base, arms, position: guided_step(base, arms, position=position, backend="reference", **sampling)

    sampling = gpu_kernels.sampling_of(case)
    gpu_kernels.check(case, step(sampling))
    with pytest.raises(AssertionError, match=mask):
        gpu_kernels.check(case, step({name: value for name, value in sampling.items() if name != "token_mask"}))


def test_plot_of_the_kernels_shows_what_was_measured(tmp_path, monkeypatch):
    """Cold peaked rows alone, by size; the floor is what they read over the bandwidth; a run may have been cut off."""
    from bench import gpu_kernels

    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    time = {"triton": gpu_kernels.Time(20.0, 19.0, 21.0)}
    results = [
        (case, time | ({"eager": gpu_kernels.Time(50.0, 50.0, 50.0)} if case.at_main_shape else {}))
        for case in gpu_kernels.cases()
        if case.filters == "none" or (case.filters == "k+p" and case.batch == 8)
    ]
    about = {"device": "a GPU", "torch": "2", "commit": "abc", "copy_gb_s": 4000.0}
    gpu_kernels.plot(tmp_path / "kernels.png", about, results)
    axes = report.plt.gcf().axes
    titles = [axis.get_title() for axis in axes]
    assert titles == [f"{row}, filters: {name}" for row in ("V=128256", "B=8", "B=64") for name in ("none", "k+p")]
    lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes[0].get_lines()}
    for name, microseconds in (("triton", 20), ("eager", 50)):
        assert lines[name] == dict.fromkeys((1, 8, 64, 256), microseconds)
    assert lines["bytes read / copy bandwidth"][64] == pytest.approx(4 * 128256 * 64 / 4000e9 * 1e6)
    over_vocab = {line.get_label(): line.get_data()[0].tolist() for line in axes[2].get_lines()}
    assert over_vocab["triton"] == [32000, 50257, 128256, 151936, 256000] and over_vocab["eager"] == [128256]
    assert not axes[5].get_lines()[:-1]  # of B = 64 with k+p nothing was measured

    first = [result for result in results if result[0].batch == 8][:1]
    for few, rows in ((first, 1), ([], 0), ([(first[0][0], {})], 0)):
        path = tmp_path / f"{len(few)}{rows}.png"
        gpu_kernels.plot(path, about, few)
        assert path.exists() == bool(rows)
        assert not rows or len(report.plt.gcf().axes) == rows


def intervals(*rows):
    from bench.decoder_profile import Interval

    return [Interval(name, stream, float(start), float(end)) for name, stream, start, end in rows]


def test_timeline_of_a_step():
    """Two steps after one that does not count; kernels of two streams side by side, gaps between some."""
    from bench import decoder_profile

    to_host, gemm = "Memcpy DtoH (Device -> Pinned)", "nvjet_tst_128x8"
    found = decoder_profile.summary(
        intervals(
            ("before", 7, 0, 90),
            (to_host, 7, 90, 100),
            (gemm, 7, 110, 150),  # a gap of 10
            (gemm, 8, 130, 160),  # 20 at once on two streams
            ("void genarm::tile_pass<float>(Arguments)", 7, 160, 170),
            (to_host, 7, 175, 180),  # a gap of 5
            (gemm, 7, 180, 200),
            ("row_pass", 7, 200, 212),
            ("row_pass", 7, 205, 220),  # at once, but on one stream
            (to_host, 7, 220, 240),
            ("after", 7, 250, 260),
        ),
        steps=2,
    )
    assert {key: value for key, value in found.items() if isinstance(value, float)} == {
        "step_us": 70, "busy_us": 62.5, "idle_us": 7.5, "gaps": 1, "longest_gap_us": 10, "two_streams_us": 10,
        "kernels": 3,
    }  # fmt: skip
    assert found["kinds"] == [["matrix products", 1.5, 45], ["ours, sampling", 1.5, 18.5], ["copies", 1, 12.5]]
    assert found["names"] == [
        [gemm, "matrix products", 1.5, 45],
        ["row_pass", "ours, sampling", 1, 13.5],
        [to_host, "copies", 1, 12.5],
        ["tile_pass<float>(Arguments)", "ours, sampling", 0.5, 5],
    ]
    with pytest.raises(ValueError, match="1 copies to the host"):
        decoder_profile.summary(intervals((to_host, 7, 0, 1)), steps=1)


def test_kinds_of_kernels():
    from bench.decoder_profile import kind_of

    for name, kind in {
        "row_pass": "ours, sampling",
        "void genarm::cluster_filtered_step<__nv_bfloat16>(genarm::Arguments)": "ours, sampling",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "void cublasLt::splitKreduce_kernel<32, 16, int>": "matrix products",
        "Memset (Device)": "copies",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>": "copies",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >": "elementwise",
        "triton_red_fused__to_copy_add_mean_mul_rsqrt_0": "elementwise",
        "void at::native::sbtopk::gatherTopK<float>": "elementwise",
        "whatever": "other",
    }.items():
        assert kind_of(name) == kind, name


def test_profiler_s_events_become_intervals(tmp_path, monkeypatch):
    """By the profiler itself, a CPU's operators for kernels; annotations and what is not on the device stay out."""
    from bench import decoder_profile

    def run():
        with torch.profiler.record_function("annotation"):
            return torch.ones(3).exp()

    for name, value in {
        "DEVICE": "cpu", "ACTIVITY": torch.profiler.ProfilerActivity.CPU, "RECORDED": torch.autograd.DeviceType.CPU
    }.items():  # fmt: skip
        monkeypatch.setattr(decoder_profile, name, value)
    found = {one.name: one for one in decoder_profile.record(run, tmp_path / "trace.json.gz")}
    assert {"aten::ones", "aten::exp"} <= found.keys() and "annotation" not in found
    assert 0 < found["aten::ones"].start < found["aten::ones"].end <= found["aten::exp"].start
    assert (tmp_path / "trace.json.gz").read_bytes().startswith(b"\x1f\x8b")

    def event(device_type):
        options = {"id": 0, "name": "a", "thread": 1, "start_us": 2.0, "end_us": 3.5, "device_resource_id": 9}
        return torch.autograd.profiler_util.FunctionEvent(**options, device_type=device_type)

    monkeypatch.undo()
    kinds = torch.autograd.DeviceType
    assert decoder_profile.intervals_of([event(kinds.CPU), event(kinds.CUDA)]) == intervals(("a", 9, 2.0, 3.5))


def test_decoder_profile_without_a_gpu(tmp_path, monkeypatch, capsys):
    """From arguments to the file and the table, on tiny models; what the profiler would record is made up."""
    from bench import decoder_profile
    from genarm.benchmark import speed as benchmark
    from genarm.decoding import checks
    from test_benchmark import TINY

    command = ["decoder_profile", "--base", "tiny", "--arm", "tiny", "--batch", "2", "--method", "genarm"]
    monkeypatch.setattr("sys.argv", [*command, "--method", "base", "--steps", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        decoder_profile.main()
    assert capsys.readouterr().err.endswith("error: needs an NVIDIA GPU\n")

    decoded = []

    def record(run, trace):
        decoded.append(run())
        copies = [("Memcpy DtoH", 7, 10 * i, 10 * i + 5) for i in range(9)]
        return intervals(*copies, ("row_pass", 7, 86, 88), ("Memcpy DtoH", 7, 90, 95))

    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decoder_profile, "DEVICE", "cpu")
    monkeypatch.setattr(decoder_profile, "record", record)
    assert decoder_profile.main() == 0
    assert [len(result.tokens[0]) for result in decoded] == [1 + decoder_profile._SETTLE] * 2
    kept = json.loads((tmp_path / "decoder_profile-tiny+tiny.json").read_text())
    assert (kept["base"], kept["arms"], kept["steps"]) == ("tiny", ["tiny"], 1) and kept["commit"]
    guided, base = kept["profiles"]
    assert (guided["method"], guided["batch"], base["method"]) == ("genarm", 2, "base")
    assert guided["floor_us"] == pytest.approx(2 * base["floor_us"], abs=2e-3) and guided["unrecorded_us"] > 0
    assert (guided["step_us"], guided["idle_us"], guided["kernels"]) == (10, 3, 1)
    assert guided["names"] == [["Memcpy DtoH", "copies", 1, 5], ["row_pass", "ours, sampling", 1, 2]]
    paths = {path["model"]: path["path"] for path in guided["paths"]}
    assert paths == {"the base": "static", "ARM 'arm1'": "static"}
    assert "tiny + tiny" in capsys.readouterr().out

    monkeypatch.setattr(checks, "static_models", lambda model, linear: "planted")
    for wrong, message in (
        (["--steps", "0"], "--steps: expected at least 1"),
        (["--base", "./no"], "no such folder"),
        ([], "the base: planted"),
    ):
        monkeypatch.setattr("sys.argv", [*command, *wrong])
        with pytest.raises(SystemExit):
            decoder_profile.main()
        assert message in capsys.readouterr().err


def test_every_case_that_is_counted_runs_once(monkeypatch):
    """Warm, in a range of its name, after the profiler's start."""
    from bench import gpu_kernels, kernel_counters

    launched, ranges = [], []

    @contextlib.contextmanager
    def entered(name):
        ranges.append(name)
        yield
        ranges.remove(name)

    for name, value in {"BATCHES": (1, 8), "MAIN_VOCAB": 1500, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    monkeypatch.setattr(gpu_kernels, "available_backends", lambda: ("reference", "triton", "cuda"))
    monkeypatch.setattr(gpu_kernels, "_ours", lambda name, _, base, *rest: launched.append((*ranges, name, len(base))))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: entered("counted"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", entered)
    kernel_counters.launch()
    cases = [(f, b, name) for f in ("none", "k+p+min-p") for b in (1, 8) for name in ("triton", "cuda")]
    assert launched[:8] == [(name, b) for _, b, name in cases]
    assert launched[8:] == [("counted", f"{name} {f} B={b}", name, b) for f, b, name in cases]


def test_counters_in_a_table(tmp_path, monkeypatch, capsys):
    """As ncu writes them: ranges in a column of their own, units in the second line, commas in numbers."""
    from bench import kernel_counters

    stall = kernel_counters.STALL.format
    columns = {
        "ID": ("", "0", "1"),
        "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg": (
            "", "1:<default domain>:triton k+p+min-p B=64:none:none:none:none:none", "",
        ),
        "Kernel Name": ("", "tile_pass", "void genarm::row_pass<float, 2>(genarm::Arguments)"),
        "dram__bytes_read.sum": ("byte", "32,833,536", "n/a"),
        "gpu__time_duration.sum": ("ns", "12,345", "5,000"),
        stall("wait"): ("inst", "1.5", "0"),
        stall("long_scoreboard"): ("inst", "20.25", "0"),
    }  # fmt: skip
    lines = [",".join(f'"{cell}"' for cell in row) for row in (columns, *zip(*columns.values(), strict=True))]
    assert kernel_counters.rows(lines) == [
        ["triton", "k+p+min-p", "64", "tile_pass", "12.35", "32.83", "", "", "", "long_scoreboard 20.2, wait 1.5"],
        ["", "", "", "genarm::row_pass<float, 2>", "5", "", "", "", "", ""],
    ]
    (tmp_path / "counters.csv").write_text("\n".join(lines))
    monkeypatch.setattr("sys.argv", ["kernel_counters", "--table", str(tmp_path / "counters.csv")])
    assert kernel_counters.main() == 0 and "long_scoreboard 20.2" in capsys.readouterr().out
    assert kernel_counters._IN_RANGE.search(kernel_counters._RANGE.format("cuda", "none", 8)).groups() == (
        "cuda", "none", "8",
    )  # fmt: skip


def test_shapes_of_launch_are_put_back(monkeypatch):
    from bench import gpu_kernels
    from genarm_kernels.backends.triton import launch

    monkeypatch.setattr(gpu_kernels, "available_backends", lambda: ("reference", "triton"))
    kept, seen = dict(launch.OPTIONS), []
    for name, shape in gpu_kernels.shapes_of_launch():
        seen.append((name, shape, launch.OPTIONS[launch.tile_pass]["num_warps"]))
    assert len(set(seen)) == 6 and {warps for *_, warps in seen} == {1, 2, 4}
    assert kept == launch.OPTIONS


@pytest.mark.skipif(not INTERPRETER, reason="no interpreter of Triton's: on a GPU the stage itself runs")
def test_gpu_linear_without_a_gpu(tmp_path, monkeypatch, capsys):
    """Every layer and subject, the right answers checked, a model's sum; other tiles, of which one does not run."""
    from bench import gpu_linear
    from genarm_kernels.backends.triton import shared_linear

    called = []

    def graph_time(call, calls):
        called.append(call(0).shape)
        return gpu_linear.Time(float(len(call(1))), 1.0, 2.0)  # microseconds: its rows

    stand_ins = {
        "graph_time": graph_time, "DEVICE": "cpu", "environment": lambda: {"copy_gb_s": 4000.0, "call_us": {}},
        "LAYERS": {"square": (64, 64, 4), "wide": (64, 96, 2)}, "BATCHES": (1, 8), "BLOCKS": 1000,
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(gpu_linear, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=10_000))
    monkeypatch.setattr("sys.argv", ["gpu_linear", "--out", str(tmp_path)])
    assert gpu_linear.main() == 0
    rows = json.loads((tmp_path / "linear.json").read_text())["results"]
    assert [row["subject"] for row in rows] == [*gpu_linear.SUBJECTS] * 4 and len(called) == 16
    assert called[:4] == [(1, 1, 64), (2, 1, 64), (2, 1, 64), (2, 1, 64)] and called[-1] == (16, 1, 96)
    shown = capsys.readouterr().out
    assert "B=8, ms a step of a 7B's linear layers: base 48.00, rows 96.00, torch 96.00, fused 96.00" in shown
    assert "base / fused: 0.500" in shown

    monkeypatch.setattr(
        gpu_linear, "TILES", {"BLOCK_N": (32, 24), "BLOCK_K": (64,), "WARPS": (4,), "MOST_STAGES": (3,)}
    )
    for name in gpu_linear.TILES:
        monkeypatch.setattr(shared_linear, name, getattr(shared_linear, name))
    monkeypatch.setattr("sys.argv", ["gpu_linear", "--out", str(tmp_path), "--tune"])
    assert gpu_linear.main() == 0
    good, bad = json.loads((tmp_path / "linear_tune.json").read_text())["results"]
    assert good["BLOCK_N"] == 32 and good["ms, B=1"] == 12 and "error" in bad  # 24 is no power of two
    assert "fastest at B = 1: {'BLOCK_N': 32" in capsys.readouterr().out

    monkeypatch.setattr(gpu_linear, "shared_linear", lambda x, layer, backend: layer.linear(x))
    with pytest.raises(AssertionError, match="torch: off by"):
        gpu_linear._compare(tmp_path)
