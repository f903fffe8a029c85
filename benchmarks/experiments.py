"""The experiments that `benchmarks.reproduce` trains, with the names of their runs and the commands that train them."""

import importlib
import re
import sys
from typing import NamedTuple

import ml_collections
from etils import epath

EXPERIMENTS = (
    "quadratic",
    "convolution",
    "resnet18",
    "learned",
    "quadratic_generalized",
    "quadratic_pruned",
    "learned_content",
    "gated",
    "learned_query",
    "learned_content_position",
    "many_heads",
)


class Variant(NamedTuple):
    """An experiment at a scale with some fields of its config set, trained once for each seed.

    Attributes:
      experiment: the config's name.
      scale: "paper", or as after the colon in configs/quadratic.py:small.
      fields: name and value of each field, as on the command line.
    """

    experiment: str
    scale: str
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name that a table has for it."""
        return " ".join([self.experiment, *(f"{field}={value}" for field, value in self.fields)])

    @property
    def suffix(self) -> str:
        """The scale as it stands after a colon."""
        return "" if self.scale == "paper" else self.scale

    def config(self) -> ml_collections.ConfigDict:
        """Returns the config as its file has it, without `fields`."""
        return importlib.import_module(f"configs.{self.experiment}").get_config(self.suffix)


class Run(NamedTuple):
    """A training of a variant with a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's workdir."""
        experiment, scale, fields = self.variant
        parts = [experiment, scale, *(f"{field}={value}" for field, value in fields), f"seed{self.seed}"]
        return re.sub(r"[^\w.=+-]", "_", "_".join(parts))

    @property
    def start(self) -> "Run | None":
        """The run that this one starts from, or None."""
        if self.variant.experiment != "quadratic_pruned":
            return None
        return Run(Variant("quadratic_generalized", self.variant.scale), self.seed)

    def workdir(self, folder: epath.Path) -> epath.Path:
        """Returns where the run lives, if runs live in `folder`."""
        return folder / self.name

    def command(self, folder: epath.Path) -> list[str]:
        """Returns the command that trains the run."""
        config = ":".join(filter(None, (f"configs/{self.variant.experiment}.py", self.variant.suffix)))
        arguments = [f"--config={config}", f"--workdir={self.workdir(folder)}"]
        if self.start:
            arguments.append(f"--config.init_from={self.start.workdir(folder)}")
        fields = [("seed", str(self.seed)), *self.variant.fields]
        return [sys.executable, "main.py", *arguments, *(f"--config.{field}={value}" for field, value in fields)]
