"""Evaluates a frozen backbone: the same as `ifm-jax eval`, from a clone."""

if __name__ == "__main__":
    from ifm_jax.cli.main import run

    run("eval")
