"""Tensors only: loading and checking a model, alignment, slot cache, tick, scheduler, sampling, lens.

Knows torch and transformers, and nothing of LangChain.
"""
