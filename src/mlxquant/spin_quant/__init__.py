"""Learned rotations of language models (SpinQuant, arXiv 2405.16406): ``from mlxquant.spin_quant import SpinQuant``."""

from .learning import Report, SpinQuant

__all__ = ["Report", "SpinQuant"]
