"""The config: every mistake named in one line, and the round trip through JSON."""

import pytest

from ifm_jax import config as configs
from ifm_jax.errors import UsageError


def changed(**fields):
    config = configs.Config()
    config.data.augmentation = "trifeature"
    for name, value in fields.items():
        holder, _, field = name.replace("__", ".").rpartition(".")
        target = getattr(config, holder) if holder and "." not in holder else config
        if "." in holder:
            target = config
            for part in holder.split("."):
                target = getattr(target, part)
        setattr(target, field, value)
    return config


def test_the_defaults_are_the_original_s():
    """The table of flags that others rely on."""
    config = configs.Config()
    configs.validate(config, devices=8)
    assert (
        configs.flatten(configs.to_dict(config)).items()
        >= {
            "model.arch": "resnet50",
            "optim.lr": 0.03,
            "optim.momentum": 0.9,
            "optim.weight_decay": 1e-4,
            "optim.milestones": [120, 160],
            "optim.schedule": "cosine",
            "epochs": 200,
            "batch_size": 256,
            "moco.dim": 128,
            "moco.queue_size": 65536,
            "moco.momentum": 0.999,
            "moco.temperature": 0.2,
            "moco.mlp": True,
            "ifm.method": "ifm",
            "ifm.epsilon": 0.1,
            "ifm.alpha": 1.0,
            "data.augmentation": "moco_v2",
            "data.source": "trifeature",
            "model.bn_groups": 8,
            "moco.shuffle_bn": True,
            "model.running_stats": "first_group",
            "seed": 0,
            "log_every": 10,
            "checkpoint_every": 1000,
            "steps": 0,
            "data.image_size": 224,
            "data.limit": 0,
            "data.workers": 0,
        }.items()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__arch": "resnet19"}, r"model.arch='resnet19' is unknown: expected one of resnet8, resnet18"),
        ({"model__stem": "big"}, "model.stem='big'"),
        ({"model__compute_dtype": "float16"}, "model.compute_dtype='float16'"),
        ({"model__running_stats": "last"}, "model.running_stats='last'"),
        ({"ifm__method": "simclr"}, "ifm.method='simclr'"),
        ({"optim__name": "rmsprop"}, "optim.name='rmsprop'"),
        ({"optim__schedule": "linear"}, "optim.schedule='linear'"),
        ({"data__augmentation": "moco_v3"}, "data.augmentation='moco_v3'"),
        ({"moco__temperature": -0.2}, r"moco.temperature=-0.2: expected a number above 0"),
        ({"moco__momentum": 1.5}, "moco.momentum=1.5: expected a number from 0 to 1"),
        ({"ifm__epsilon": -0.1}, "ifm.epsilon=-0.1"),
        ({"ifm__epsilon_negative": -0.1}, "ifm.epsilon_negative=-0.1"),
        ({"ifm__alpha": -1.0}, "ifm.alpha=-1.0"),
        ({"optim__lr": 0.0}, "optim.lr=0.0"),
        ({"optim__momentum": 1.0}, "optim.momentum=1.0"),
        ({"optim__warmup_epochs": 300.0}, "optim.warmup_epochs=300.0: expected a number from 0 to epochs=200"),
        ({"optim__milestones": ("a",)}, r"optim.milestones=\('a',\): expected epochs above 0"),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"log_every": 0}, "log_every=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 100}, "batch_size=100 is not a multiple of model.bn_groups=8"),
        ({"batch_size": 8}, "model.bn_groups=8: expected below batch_size=8"),
        ({"moco__queue_size": 1000}, r"moco.queue_size=1000 is not a multiple of batch_size=256: take 768"),
        (
            {"data__source": "cifar"},
            "data.source='cifar': expected trifeature, folder:PATH, tfds:NAME or array:FILE.npz",
        ),
        ({"data__image_size": 16}, "data.image_size=16: expected 32 to 224"),
        ({"data__trifeature__shapes": 11}, "data.trifeature.shapes=11: expected 2 to 10"),
        ({"data__trifeature__scale_min": 0.95}, "scale_min"),
        ({"data__augment__crop_min": 0.0}, "data.augment.crop_min=0.0"),
        ({"data__augment__flip": 2.0}, "data.augment.flip=2.0"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UsageError, match=message) as caught:
        configs.validate(changed(**fields))
    assert "\n" not in str(caught.value)


def test_batch_must_split_over_the_devices():
    with pytest.raises(UsageError, match="batch_size=256 is not a multiple of the 3 devices"):
        configs.validate(changed(), devices=3)


def test_round_trip():
    config = changed(ifm__epsilon_negative=0.2, optim__milestones=(3, 4), data__trifeature__colors=5)
    again = configs.from_dict(configs.to_dict(config))
    assert again == config
    assert isinstance(again.optim.milestones, tuple)
    assert configs.differences(again, config) == []


def test_unknown_field_is_refused_and_a_missing_one_keeps_its_default():
    with pytest.raises(UsageError, match=r"'moco.size' is unknown"):
        configs.from_dict({"moco": {"size": 3}})
    with pytest.raises(UsageError, match=r"'mocco.dim' is unknown"):
        configs.from_dict({"mocco": {"dim": 3}})
    assert configs.from_dict({"moco": {"dim": 3}}).moco.queue_size == 65536


def test_differences_name_the_fields_that_decide():
    ours, theirs = changed(seed=1, steps=5, log_every=1), changed()
    assert configs.differences(ours, theirs) == ["seed: 1, not 0"]


def test_epsilons():
    assert configs.epsilons(configs.IFMConfig(epsilon=0.1)) == (0.1, 0.1)
    assert configs.epsilons(configs.IFMConfig(epsilon=0.1, epsilon_negative=0.3)) == (0.1, 0.3)
