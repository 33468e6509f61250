"""Converts checkpoints between PyTorch and JAX: the same as `ifm-jax convert`, from a clone."""

if __name__ == "__main__":
    from ifm_jax.cli.main import run

    run("convert")
