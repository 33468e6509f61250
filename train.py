"""Pre-trains an encoder with MoCo-v2 or SimCLR and implicit feature modification.

    python train.py                                              the embedded default, into runs/trifeature
    python train.py --config=configs/x.py --workdir=DIR          a recipe
    python train.py --config.ifm.epsilon=0.2 --workdir=DIR       with a field changed

The same command resumes the run in the workdir.
"""

if __name__ == "__main__":
    from ifm_jax import process

    process.begin(hosts=True)  # first: what is imported below takes seconds

    from ifm_jax.cli import train

    train.run(__doc__)
