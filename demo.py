"""Pre-trains with InfoNCE and IFM on drawn images: the same as `ifm-jax demo`, from a clone."""

if __name__ == "__main__":
    from ifm_jax.cli.main import run

    run("demo")
