"""Model folders, rows and recipes of small runs."""

from tests.cli.conftest import adapter
from tests.train.conftest import data_file, model_folder, recipe

__all__ = ["adapter", "data_file", "model_folder", "recipe"]
