"""`python -m ifm_jax.replay`: the command under its name; the code is in `ifm_jax.torch_interop.replay`."""

if __name__ == "__main__":
    from ifm_jax import process

    process.begin()

    import runpy

    runpy.run_module("ifm_jax.torch_interop.replay", run_name="__main__", alter_sys=True)
