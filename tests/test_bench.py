"""The benchmark of guided_step runs, its baselines do the same job, its checks find mistakes, its report reads it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import baselines, report
from bench import test_guided_step as suite
from genarm_kernels import available_backends, guided_log_softmax, guided_step
from genarm_kernels.testing import make_logits, pooled_chi_squared

REPOSITORY = Path(__file__).parent.parent
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
        environment = os.environ | {"GENARM_BENCH_GRID": "tiny", "GENARM_BENCH_DEVICE": "cpu"}
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
    assert len(kept["cases"]) == len(checked) == 2 * 2 * 4 * 2
    assert kept["device"] == "NVIDIA None" and kept["call_us"] == {"triton": 33.0}
    failed = [case for case in kept["cases"] if "triton" not in case]
    assert failed and all(case["filters"] == "p=0.9" and case["cache"] == "warm" for case in failed)
    assert "RuntimeError: planted" in shown and f"{len(failed)} cases failed on a backend of ours" in shown
    assert "triton none B=1: us: 1 (bound 9) holds" in shown and "triton none B=64: us: 64 (bound 14) MISSED" in shown
    assert "triton none B=256: us: None (bound 42) not measured" in shown
    assert "times faster than eager: 1.0 (bound 20) MISSED" in shown


def test_shapes_of_launch_are_put_back(monkeypatch):
    from bench import gpu_kernels
    from genarm_kernels.backends.triton import launch

    monkeypatch.setattr(gpu_kernels, "available_backends", lambda: ("reference", "triton"))
    kept, seen = dict(launch.OPTIONS), []
    for name, shape in gpu_kernels.shapes_of_launch():
        seen.append((name, shape, launch.OPTIONS[launch.tile_pass]["num_warps"]))
    assert len(set(seen)) == 6 and {warps for *_, warps in seen} == {1, 2, 4}
    assert kept == launch.OPTIONS
