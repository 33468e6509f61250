"""The order of the images: the same wherever and whenever it is read."""

import itertools

import numpy as np
import pytest

from ifm_jax.data import steps_per_epoch, training_batches
from ifm_jax.errors import UsageError


class Numbers:
    """A source whose image i is filled with i."""

    label_names = {}  # noqa: RUF012

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def examples(self, indices):
        return {"image": np.asarray(indices)[:, None, None, None].repeat(3, axis=3)}


def numbers(count, **options):
    batches = training_batches(Numbers(50), 8, **({"seed": 0} | options))
    return [batch["views"][:, 0, 0, 0, 0] for batch in itertools.islice(batches, count)]


def test_an_epoch_is_a_permutation_without_its_remainder():
    batches = numbers(18)  # three epochs of six
    for epoch in range(3):
        seen = np.concatenate(batches[6 * epoch : 6 * epoch + 6])
        assert len(set(seen)) == 48
    # Each epoch has an order of its own, and leaves other images out.
    assert any((batches[i] != batches[i + 6]).any() for i in range(6))


def test_a_restart_needs_only_the_step():
    for a, b in zip(numbers(20)[13:], numbers(7, start=13), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_pieces_of_the_same_batches(hosts):
    whole = numbers(8, start=3)
    pieces = [numbers(8, start=3, host=host, hosts=hosts) for host in range(hosts)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([piece[step] for piece in pieces]), batch)


def test_threads_change_nothing():
    for a, b in zip(numbers(15, threads=1), numbers(15, threads=8), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_seed_decides():
    assert any((a != b).any() for a, b in zip(numbers(6), numbers(6, seed=1), strict=True))


def test_a_limit_takes_the_first_images():
    assert np.concatenate(numbers(9, size=20)).max() < 20


def test_an_epoch_may_end_with_what_is_left():
    """Fifty images in seven batches of eight, the last of two and six copies; the same on two hosts."""
    batches = list(itertools.islice(training_batches(Numbers(50), 8, seed=0, indices=True, remainder=True), 14))
    for epoch in (batches[:7], batches[7:]):
        index, weight = (np.concatenate([batch[name] for batch in epoch]) for name in ("index", "weight"))
        assert sorted(index[weight == 1]) == list(range(50))
        assert weight[:50].all()
        assert not weight[50:].any()
    assert any((a["index"] != b["index"]).any() for a, b in zip(batches[:7], batches[7:], strict=True))
    options = {"seed": 0, "indices": True, "remainder": True, "start": 6, "hosts": 2}
    parts = [next(training_batches(Numbers(50), 8, host=host, **options)) for host in range(2)]
    for name in ("index", "weight"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batches[6][name])
    assert steps_per_epoch(50, 8, remainder=True) == 7


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(UsageError, match=r"batch_size=64 is more than the 50 training images: use .* such as 32"):
        steps_per_epoch(50, 64)
