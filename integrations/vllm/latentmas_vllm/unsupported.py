"""Stands for `model` where vLLM is too old or too new: says so when the model is asked for, and not before."""

import vllm

from . import unsupported

raise ImportError(unsupported(vllm.__version__))
