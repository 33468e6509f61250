"""The config: every mistake named in one line, and the round trip through JSON."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

from ifm_jax import config as configs
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags
from ifm_jax.errors import UsageError
from ifm_jax.runs.workdir import Workdir


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
            "method": "moco",
            "ifm.objective": "ifm",
            "ifm.epsilon": 0.1,
            "ifm.alpha": 1.0,
            "data.augmentation": "moco_v2",
            "data.source": "trifeature",
            "model.bn_groups": 0,
            "simclr.temperature": 0.5,
            "hard.beta": 0.0,
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
        ({"ifm__objective": "simclr"}, "ifm.objective='simclr'"),
        ({"moco__shuffle_bn": "random"}, "moco.shuffle_bn='random': expected true, false or balanced$"),
        ({"moco__shuffle_bn": 1}, "moco.shuffle_bn=1: expected true, false or balanced"),
        (
            {"moco__shuffle_bn": "balanced", "model__bn_groups": 32},
            "moco.shuffle_bn='balanced': expected a batch_size that is a multiple of 1024, the square of "
            "model.bn_groups=32, not 256; or moco.shuffle_bn=true",
        ),
        (
            {"optim__reduce_dtype": "bfloat16"},
            "optim.reduce_dtype='bfloat16' is unknown: expected one of",
        ),
        ({"method": "byol"}, "method='byol' is unknown: expected one of moco, simclr"),
        ({"hard__beta": -0.5}, r"hard.beta=-0.5: expected a number of at least 0"),
        ({"hard__tau_plus": 1.0}, r"hard.tau_plus=1.0: expected a number of at least 0, below 1|hard.tau_plus=1.0"),
        ({"method": "simclr", "batch_size": 1}, r"bn_groups=1: expected a number below batch_size=1|batch_size=1"),
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
        ({"epochs": 0}, "epochs=0: expected a whole number of at least 1"),
        ({"log_every": 0}, "log_every=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 100}, "batch_size=100 is not a multiple of model.bn_groups=8"),
        ({"batch_size": 8}, "model.bn_groups=8: expected a number below batch_size=8"),
        ({"moco__queue_size": 1000}, r"moco.queue_size=1000 is not a multiple of batch_size=256: use 768"),
        (
            {"data__source": "cifar"},
            "data.source='cifar': expected trifeature, digits, folder:PATH, tfds:NAME, array:FILE.npz or randbit:BITS:",
        ),
        ({"data__source": "randbit:4:cifar"}, "data.source='randbit:4:cifar': expected trifeature, digits, "),
        ({"data__source": "randbit:x:digits"}, "data.source='randbit:x:digits': expected .* or randbit:BITS:SOURCE"),
        ({"data__source": "randbit:2:randbit:2:digits"}, "data.source='randbit:2:randbit:2:digits': expected trifeat"),
        ({"data__source": "randbit:33:digits", "data__image_size": 32}, "expected at most 32 bits in randbit:BITS:"),
        ({"data__source": "randbit:4:folder:"}, "data.source='folder:' names no folder"),
        ({"data__image_size": 16}, "data.image_size=16: expected 32 to 224"),
        ({"data__trifeature__shapes": 11}, "data.trifeature.shapes=11: expected a whole number from 2 to 10"),
        ({"data__trifeature__scale_min": 0.95}, "scale_min"),
        ({"data__digits__digits": 1}, "data.digits.digits=1: expected a whole number from 2 to 10"),
        ({"data__digits__scale_min": 0.3}, "data.digits.scale_min=0.3: expected a number from 0.4 to 1"),
        (
            {"data__source": "digits", "data__digits__scale_min": 0.8},
            r"data.digits.scale_min, scale_max=\(0.8, 0.75\): expected scale_min <= scale_max",
        ),
        ({"data__source": "digits", "data__image_size": 31}, "data.image_size=31: expected 32 to 224 with digits"),
        ({"data__source": "digits", "data__classes": "a.txt"}, "data.classes='a.txt': expected empty with digits"),
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


@pytest.mark.parametrize("value", [True, False, "balanced"])
def test_shuffle_bn_is_a_switch_with_a_third_value(value):
    config = changed(moco__shuffle_bn=value, batch_size=64)
    configs.validate(config)
    again = configs.from_json(json.dumps(configs.to_dict(config)))
    assert again.moco.shuffle_bn is value or again.moco.shuffle_bn == value == "balanced"
    configs.validate(changed(moco__shuffle_bn=value, method="simclr", batch_size=6, model__bn_groups=3))
    with pytest.raises(UsageError, match=r"moco.shuffle_bn='true': expected true, false or balanced"):
        configs.from_dict({"moco.shuffle_bn": "true"})


def test_unknown_field_is_refused_and_a_missing_one_keeps_its_default():
    with pytest.raises(UsageError, match=r"'moco.size' is unknown"):
        configs.from_dict({"moco": {"size": 3}})
    with pytest.raises(UsageError, match=r"'mocco' is unknown: did you mean 'moco'\?"):
        configs.from_dict({"mocco": {"dim": 3}})
    assert configs.from_dict({"moco": {"dim": 3}}).moco.queue_size == 65536


def test_differences_name_the_fields_that_decide():
    ours, theirs = changed(seed=1, steps=5, log_every=1), changed()
    assert configs.differences(ours, theirs) == ["seed: 1, not 0"]


def test_epsilons():
    assert configs.epsilons(configs.IFMConfig(epsilon=0.1)) == (0.1, 0.1)
    assert configs.epsilons(configs.IFMConfig(epsilon=0.1, epsilon_negative=0.3)) == (0.1, 0.3)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 1e400, 1e39, 10**400])
def test_numbers_are_finite(number):
    """Every field that is a number, or several."""
    for name, each in configs.fields().items():
        if each.kind is float:
            config = configs.Config()
            configs.set_field(config, name, (number,) if each.many else number)
            with pytest.raises(UsageError, match=rf"^{name}=.*: expected ") as caught:
                configs.validate(config)
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [2**31, 2**32, 2**63, 2**64, 10**12, -(2**31), True, 3.0, "3", None, (3,)])
def test_whole_numbers_are_those_that_the_arithmetic_holds(value):
    for name, each in configs.fields().items():
        if each.kind is not int or (each.declared.limit == 2**32 - 1 and value == 2**31):
            continue
        config = configs.Config()
        configs.set_field(config, name, (value,) if each.many else value)
        with pytest.raises(UsageError, match=rf"^{name}=.*: expected ") as caught:
            configs.validate(config)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32),
        ("linear.seed", 2**32),
        ("epochs", 10**8),
        ("moco.dim", 10**6),
        ("data.workers", 2000),
        ("data.image_size", 10**5),
        ("steps_per_call", 10**6),
        ("optim.lr", -0.0),
        ("moco.temperature", 1e-60),
        ("data.source", "folder:\0"),
    ],
)
def test_bounds_of_the_machine(name, value):
    config = configs.Config()
    configs.set_field(config, name, value)
    with pytest.raises(UsageError, match=rf"^{name}="):
        configs.validate(config)


def test_a_number_too_long_to_show():
    with pytest.raises(UsageError, match="batch_size=int too long to show: expected a whole number"):
        configs.validate(configs.Config(batch_size=10**5000))


def test_the_largest_seed_and_a_negative_zero():
    """A seed of more than 32 bits would be another's: JAX takes the low ones alone."""
    config = configs.Config(seed=2**32 - 1)
    config.ifm.epsilon = -0.0
    configs.validate(config)


def test_every_default_holds_and_every_field_is_described():
    for name, each in configs.fields().items():
        value = configs.get_field(configs.Config(), name)
        each.check(value)
        assert each.declared.meaning
        assert each.expected()
        if not each.is_group:
            assert type(value) is type(each.default)
            # A text, a list, a dict and another group are none of its values, unless it is text.
            for wrong in ([1], {}, object(), configs.EvalConfig(), b"x") + (() if each.kind is str else ("x",)):
                with pytest.raises(UsageError, match=rf"^{name}=.*: expected "):
                    each.check(wrong)


def test_what_is_no_field_is_refused_where_it_is_set():
    config = configs.Config()
    with pytest.raises(AttributeError, match="MoCoConfig has no field 'temprature': did you mean 'temperature'"):
        config.moco.temprature = 0.5
    with pytest.raises(AttributeError, match="Config has no field 'optimm': did you mean 'optim'"):
        config.optimm.lr = 0.5
    with pytest.raises(AttributeError, match=r"has no field 'zzz'$"):
        config.data.zzz = 1
    assert not hasattr(config, "zzz")


def test_a_list_stands_for_a_tuple_and_copies_are_equal():
    config = configs.Config()
    config.optim.milestones = [3, 4]
    config.linear.lr = [1, np.float64(0.5)]
    configs.validate(config)
    assert config.optim.milestones == (3, 4)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert again == config


@pytest.mark.parametrize("config", [None, {}, configs.MoCoConfig(), configs.Config])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(UsageError, match=r"expected an ifm_jax\.Config"):
        configs.validate(config)


@dataclasses.dataclass(slots=True)
class Renamed(configs.Group):
    """A group whose field was called otherwise, and its values too."""

    objective: str = configs.field(
        "ifm", "the loss", choices=("infonce", "ifm"), formerly={"method": {"moco": "infonce"}}, free_on_resume=True
    )


def test_a_former_name_is_read_and_set():
    group = Renamed()
    group.method = "moco"
    assert (group.method, group.objective) == ("infonce", "infonce")
    group.method = "ifm"
    assert group == Renamed()
    known, renamed = configs.find("method", Renamed)
    assert (known.name, renamed) == ("objective", {"moco": "infonce"})
    assert configs.find("methods", Renamed) is None
    assert known.free_on_resume


def test_a_former_name_in_a_dict_and_on_the_command_line():
    """`ifm.method` is `ifm.objective` now, and its "moco" is "infonce"."""
    assert configs.from_dict({"ifm": {"method": "moco"}}).ifm.objective == "infonce"
    assert configs.from_dict({"ifm.method": "ifm_only"}).ifm.objective == "ifm_only"
    config = configs.Config()
    config.ifm.method = "moco"
    assert (config.ifm.objective, config.ifm.method) == ("infonce", "infonce")
    given = Flags(config=ConfigFlag()).parse(["--config.ifm.method=moco"])
    assert given.config.changes == {"ifm.objective": "infonce"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"a config is \[\]: expected fields by name"),
        ("null", "a config is None"),
        ("5", "a config is 5"),
        ('"x"', "a config is 'x'"),
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ('{"moco": ' + '{"dim": ' * 400 + "1" + "}" * 401, r"moco.dim=\{'dim': .*: expected a whole number"),
        ('{"moco": 5}', "moco=5: expected a group of fields"),
        ('{"moco": null}', "moco=None: expected a group"),
        ('{"moco": [1]}', r"moco=\(1,\): expected a group"),
        ('{"batch_size": "64"}', "batch_size='64': expected a whole number"),
        ('{"batch_size": 64.0}', "batch_size=64.0"),
        ('{"batch_size": true}', "batch_size=True"),
        ('{"batch_size": [64]}', r"batch_size=\(64,\)"),
        ('{"batch_size": {"x": 1}}', "batch_size={'x': 1}"),
        ('{"batch_size": null}', "batch_size=None"),
        ('{"optim": {"milestones": 3}}', "optim.milestones=3"),
        ('{"optim": {"milestones": [[3]]}}', "optim.milestones="),
        ('{"moco": {"dims": 3}}', "config field 'moco.dims' is unknown: did you mean 'moco.dim'"),
        ('{"": {"": 3}}', "config field '' is unknown"),
        ('{"zzz": 3}', "config field 'zzz' is unknown: written by another version of ifm_jax?"),
        ('{"batch_size": ' + "9" * 5000 + "}", "it is not JSON"),
    ],
)
def test_a_config_json_of_something_else_is_one_line_that_names_the_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        Workdir(tmp_path).read_config()
    assert str(caught.value).startswith(f"{tmp_path}/config.json cannot be read (")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_config_json_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"init_from": "caf\xe9"}')
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        Workdir(tmp_path).read_config()
    (tmp_path / "workdir" / "config.json").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        Workdir(tmp_path / "workdir").read_config()


def test_what_was_read_is_what_was_written():
    config = changed(ifm__epsilon_negative=0.2, optim__milestones=(), linear__lr=(1, 2.5))
    assert configs.from_json(json.dumps(configs.to_dict(config))) == config
    assert configs.from_dict(configs.flatten(configs.to_dict(config))) == config
