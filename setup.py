"""The packages of the wheel; all else is in pyproject.toml, which cannot add a folder from beside the package to it."""

from setuptools import find_packages, setup

RECIPES = "ifm_jax.configs"

setup(
    packages=[
        *find_packages(include=["ifm_jax*"]),
        RECIPES,
        *(f"{RECIPES}.{name}" for name in find_packages("configs")),
    ],
    package_dir={RECIPES: "configs"},
    package_data={RECIPES: ["*.txt"]},
)
