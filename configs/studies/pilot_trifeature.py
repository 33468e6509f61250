"""Pilot on Trifeature: where is the positive easy, where is a feature suppressed, and where does IFM act?

    ifm-jax study --config=configs/studies/pilot_trifeature.py --workdir=runs/pilot_trifeature

Exploratory: its seeds start at 1000 and are used for nothing else. It chooses the setting of `confirmation.py`.

Hardware: about an hour and a half of two CPU cores.
"""

from ifm_jax import recipes
from ifm_jax.studies import Comparison, Study

SEEDS = (1000, 1001)


def arms() -> dict[str, dict]:
    """Returns the arms of the pilots: the axes that Robinson et al. 2021 name, around SimCLR at T = 0.07."""
    found: dict[str, dict] = {}

    def pair(name: str, *epsilons: float, **fields) -> None:
        found[name] = {"ifm.objective": "infonce"} | fields
        for epsilon in epsilons:
            found[f"{name}, eps {epsilon:g}"] = {"ifm.objective": "ifm", "ifm.epsilon": epsilon} | fields

    def moco(queue: int) -> dict:
        return {"method": "moco", "moco.temperature": 0.07, "moco.queue_size": queue, "model.bn_groups": 2}

    pair("T 0.07", 0.1, 0.05, 0.2)
    pair("T 0.2", 0.1, 0.2, **{"simclr.temperature": 0.2})
    pair("T 0.5", 0.1, **{"simclr.temperature": 0.5})
    for beta in (1.0, 2.0):
        found[f"T 0.07, beta {beta:g}"] = {"ifm.objective": "infonce", "hard.beta": beta}
    found["T 0.2, beta 1"] = {"ifm.objective": "infonce", "hard.beta": 1.0, "simclr.temperature": 0.2}
    pair("MoCo K 64", 0.1, **moco(64))
    pair("MoCo K 2048", 0.1, **moco(2048))
    pair("batch 256", 0.1, **{"batch_size": 256})
    pair("SGD", 0.1, **{"optim.name": "sgd", "optim.lr": 0.06})
    pair("T 0.1", 0.1, **{"simclr.temperature": 0.1})
    return found


def comparisons() -> list[Comparison]:
    """Returns IFM against InfoNCE in every setting, and temperature and hardness against T = 0.07."""
    names = list(arms())
    asked = [Comparison(name, name.split(", eps")[0]) for name in names if ", eps" in name]
    for name in ("T 0.1", "T 0.2", "T 0.5", "T 0.07, beta 1", "T 0.07, beta 2", "SGD", "batch 256"):
        asked.append(Comparison(name, "T 0.07"))
    return asked


def get_study() -> Study:
    """Returns the study."""
    config = recipes.load("ifm_simclr_trifeature")
    config.checkpoint_keep = 1
    return Study(
        question="Where is the positive easy, where is a feature suppressed, and where does IFM act?",
        sources={"trifeature": config},
        arms=arms(),
        seeds=SEEDS,
        comparisons=comparisons(),
    )
