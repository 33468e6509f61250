"""Pre-trains an encoder: the same as `ifm-jax train`, from a clone."""

if __name__ == "__main__":
    from ifm_jax.cli.main import run

    run("train")
