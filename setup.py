"""The one thing pyproject.toml cannot say: ``kernels/`` installs inside the package.

At the top level its name would collide with the PyPI package `kernels`, which transformers imports.
"""

from setuptools import find_packages, setup

kernels = [f"fastprompt.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

setup(
    packages=[*find_packages(include=["fastprompt", "fastprompt.*"]), *kernels],
    package_dir={"fastprompt.kernels": "kernels"},
)
