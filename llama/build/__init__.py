"""Where the model and the weight streaming manager meet: nothing else in ``llama`` imports ``wsm``."""

from llama.build.inputs import BuildOptions, Inputs, open_inputs, plan_run
from llama.build.llm import LLaMA

__all__ = ["BuildOptions", "Inputs", "LLaMA", "open_inputs", "plan_run"]
