"""RandBit: how much of the images is still learned beside random bits that both views share? Does IFM learn more of it?

    ifm-jax study --config=studies/randbit --workdir=runs/randbit

The bits are a shortcut of known strength (Chen, Luo and Li, NeurIPS 2021, `data/random_bits.py`): with b of them, 2^b
kinds of image can be told apart without a look at the image. Exploratory, with the pilots' seeds.

Hardware: a quarter of an hour of two CPU cores.
"""

from ifm_jax import recipes
from ifm_jax.studies import Comparison, Study

BITS = (0, 2, 4, 8)


def get_study() -> Study:
    """Returns the study."""
    sources = {}
    for bits in BITS:
        config = sources[f"{bits} bits"] = recipes.load("ifm_simclr_trifeature")
        config.checkpoint_keep = 1
        if bits:
            config.data.source = f"randbit:{bits}:{config.data.source}"
    return Study(
        question="How much of the images is still learned beside random bits, and does IFM learn more of it?",
        sources=sources,
        arms={"InfoNCE": {"ifm.objective": "infonce"}, "IFM 0.1": {"ifm.objective": "ifm"}},
        seeds=(1000, 1001),
        comparisons=[Comparison("IFM 0.1", "InfoNCE", labels=("mean", "worst", "shape", "texture", "color"))],
    )
