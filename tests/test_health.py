"""What a run says of its health: chance level at the start, a warning when something is wrong, silence otherwise."""

import math

import jax
import pytest

from ifm_jax.runs import loop, training
from ifm_jax.runs.health import Health
from tests import small


def watch(health, losses, accuracies, epochs_each=0.5):
    """All that is said of a run with these metrics, from step 1 on."""
    said = []
    for number, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), 1):
        said += health.watch({"step": number, "epoch": number * epochs_each, "loss_clean": loss, "acc1": accuracy})
    return said


def test_a_healthy_run_is_not_commented_on():
    """The loss rises while the queue fills, falls afterwards, and is noisy."""
    health = Health(64, 1000, queue=True, full_step=30)
    filling = [1 + 0.1 * number for number in range(30)]
    falling = [4.0 - 0.01 * number + 0.1 * (-1) ** number for number in range(100)]
    assert watch(health, filling + falling, [20.0] * 130) == []


def test_a_rise_of_the_loss_is_said_once_and_only_after_the_queue_is_full():
    rising = [2 + 0.02 * number for number in range(100)]
    said = watch(Health(64, 1000, queue=True, full_step=10), rising, [50.0] * 100)
    assert len(said) == 1
    assert said[0].startswith("Warning: the loss rises, from 2.3")
    assert watch(Health(64, 1000, queue=True, full_step=100), rising, [50.0] * 100) == []


def test_accuracy_at_chance_is_said_after_two_epochs():
    chance = 100 / 65
    said = watch(Health(64, 1000, queue=False, full_step=0), [4.17] * 60, [chance] * 60)
    assert len(said) == 1
    assert "contrast accuracy is 1.5 % after 10 epochs, about chance" in said[0]
    assert watch(Health(64, 1000, queue=False, full_step=0), [4.17] * 60, [10.0] * 60) == []
    assert watch(Health(64, 1000, queue=False, full_step=0), [4.17] * 30, [chance] * 30, epochs_each=0.01) == []


def test_more_keys_than_images():
    lines = Health(65536, 8192, queue=True, full_step=256).introduction()
    assert lines[0].startswith("Chance level: InfoNCE 11.09 (the logarithm of 1 + 65,536 negatives)")
    assert "until step 256" in lines[1]
    assert "65,536 keys, more than the 8,192 images" in lines[2]
    assert len(Health(126, 100, queue=False, full_step=0).introduction()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("method", "negatives"), [("moco", 64), ("simclr", 30)])
def test_a_run_begins_with_its_chance_level(tmp_path, capsys, monkeypatch, method, negatives):
    seen = {}
    monkeypatch.setattr(loop, "draw_curves", lambda *_, chance=None: seen.update(chance=chance))
    config = small.config(method=method, simclr__dim=8, steps=2)
    with small.light(curves=True):
        training.train(config, tmp_path, devices=jax.devices()[:1])
    out = capsys.readouterr().out
    assert f"Chance level: InfoNCE {math.log(1 + negatives):.2f} " in out
    assert ("until step 4, when" in out) == (method == "moco")
    assert seen["chance"] == pytest.approx(math.log(1 + negatives))
