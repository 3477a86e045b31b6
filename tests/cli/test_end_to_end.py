"""The whole product by its command line, on the bundled models. Minutes: `make test-slow`."""

import json
import signal
import statistics
import subprocess
import sys

import pytest

from bench import guidance
from genarm import GuidedDecoder, bundled, world

pytestmark = pytest.mark.slow


def command(*arguments):
    return [sys.executable, "-m", "genarm", *map(str, arguments)]


def test_true_rewards_rise_with_the_weight():
    """500 samples a setting; each attribute rises over the weights, and at weight 1 beyond doubt."""
    decoder = GuidedDecoder.from_pretrained(
        bundled.path("base"), {name: bundled.path(name) for name in world.ATTRIBUTES}
    )
    unguided = guidance.true_rewards(decoder, {}, 500)
    for attribute in world.ATTRIBUTES:
        by_weight = {0.0: unguided[attribute]}
        for weight in guidance.WEIGHTS[1:]:
            by_weight[weight] = guidance.true_rewards(decoder, {attribute: weight}, 500)[attribute]
        means = [statistics.fmean(by_weight[weight]) for weight in guidance.WEIGHTS]
        assert means == sorted(means), means
        assert guidance.p_value(by_weight[0.0], by_weight[1.0]) < 0.001


KILLED = """
import os, signal, sys
from genarm.cli import app as cli
from genarm.training import arm as training
class Killed(training.ArmTrainer):
    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)
        if self.state.global_step == 35:
            os.kill(os.getpid(), signal.SIGKILL)
training.ArmTrainer = Killed
cli.main(sys.argv[1:])
"""


def test_lora_arm_from_pairs_to_text(tmp_path):
    """`genarm train` on 2,000 pairs, killed half-way and resumed, then `genarm generate` with the adapter."""
    data = tmp_path / "prefs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in world.preference_pairs("polite", 2000, seed=5)))
    train = ["train", "--base", bundled.path("base"), "--data", data, "--save-steps", 10, "--beta", 0.5, "--lr", 5e-3]
    subprocess.run(command(*train, "--out", tmp_path / "whole"), check=True)

    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, train), "--out", tmp_path / "killed"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()
    subprocess.run(command(*train, "--out", tmp_path / "killed", "--resume"), check=True)

    def losses(name):
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    assert len(losses("whole")) == 60
    assert losses("killed") == pytest.approx(losses("whole"), abs=1e-6)
    metrics = json.loads((tmp_path / "killed" / "metrics.json").read_text())
    assert metrics["preference_accuracy"] > 0.7
    assert (tmp_path / "killed" / "adapter_config.json").exists()

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in world.sample_prompts(60, seed=8)))
    generate = ["generate", "--base", bundled.path("base"), "--prompts", prompts, "--seed", 3]
    texts = {}
    for weight in (0, 2):
        out = tmp_path / f"{weight}.jsonl"
        subprocess.run(command(*generate, "--arm", f"kind={tmp_path / 'killed'}:{weight}", "--out", out), check=True)
        texts[weight] = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    unguided, guided = (world.true_rewards(texts[weight])["polite"] for weight in (0, 2))
    assert guidance.p_value(unguided, guided) < 0.001
