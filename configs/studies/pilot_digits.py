"""Pilot on digits over textures: where is the positive easy, where is a feature suppressed, and where does IFM act?

    ifm-jax study --config=configs/studies/pilot_digits.py --workdir=runs/pilot_digits

Exploratory: its seeds start at 1000 and are used for nothing else. It chooses the setting of `confirmation.py`.

Hardware: three quarters of an hour of two CPU cores.
"""

from ifm_jax import recipes
from ifm_jax.studies import Comparison, Study

MOCO = {"method": "moco", "moco.temperature": 0.07, "moco.queue_size": 64, "model.bn_groups": 2}


def get_study() -> Study:
    """Returns the study."""
    config = recipes.load("simclr_digits")
    config.checkpoint_keep = 1
    arms: dict[str, dict] = {}
    for name, epsilons, fields in (
        ("T 0.07", (0.1, 0.05, 0.2), {}),
        ("T 0.2", (0.1,), {"simclr.temperature": 0.2}),
        ("T 0.5", (0.1,), {"simclr.temperature": 0.5}),
        ("MoCo K 64", (0.1,), MOCO),
    ):
        arms[name] = {"ifm.objective": "infonce"} | fields
        for epsilon in epsilons:
            arms[f"{name}, eps {epsilon:g}"] = {"ifm.objective": "ifm", "ifm.epsilon": epsilon} | fields
    for beta in (1.0, 2.0):
        arms[f"T 0.07, beta {beta:g}"] = {"ifm.objective": "infonce", "hard.beta": beta}
    comparisons = [Comparison(name, name.split(", eps")[0]) for name in arms if ", eps" in name]
    for name in ("T 0.2", "T 0.5", "T 0.07, beta 1", "T 0.07, beta 2"):
        comparisons.append(Comparison(name, "T 0.07"))
    return Study(
        question="Where is the positive easy, where is a feature suppressed, and where does IFM act?",
        sources={"digits": config},
        arms=arms,
        seeds=(1000, 1001),
        comparisons=comparisons,
    )
