"""`python -m ifm_jax COMMAND ...`: the same as `ifm-jax COMMAND ...`."""

if __name__ == "__main__":
    from ifm_jax.cli.main import main

    main()
