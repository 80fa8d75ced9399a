"""Which methods exist. A new method is one file, one line in ``FILES``, one ``@register`` line and one
citation, and the law tests cover it.

Kinds: "steps" chooses the grid of a weight, "round" its codes, "refine" improves both by turns, "range" chooses the
activation table of a layer, "tier" how many bits its input gets at each timestep, "transform" what could be done to its
input before, "branch" what low-rank factors take from its weight, "reconstruct" learns the codes of a whole block,
"fake" is what a model is trained through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, TypeVar

from ..errors import RecipeError

KINDS = ("steps", "round", "range", "tier", "refine", "transform", "branch", "reconstruct", "fake")
FILES = (
    "weights.steps",
    "weights.rtn",
    "weights.gptq",
    "weights.descent",
    "weights.qronos",
    "weights.gptaq",
    "weights.refit",
    "weights.adaround",
    "inputs.clipping",
    "inputs.time_networks",
    "inputs.envelopes",
    "inputs.timestep_groups",
    "inputs.dynamic",
    "inputs.tiers",
    "transforms.smoothquant",
    "transforms.ptq4dit",
    "transforms.tcaq",
    "transforms.rotation",
    "weights.lowrank",
    "fake_quantizers",
)
CITATIONS = {
    "gptq": (
        """@inproceedings{frantar2023gptq,
  title = {{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers},
  author = {Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  note = {arXiv:2210.17323}
}"""
    ),
    "quantease": (
        """@article{behdin2023quantease,
  title = {{QuantEase}: Optimization-based Quantization for Language Models},
  author = {Behdin, Kayhan and Acharya, Ayan and Gupta, Aman and Song, Qingquan
            and Zhu, Siyu and Keerthi, Sathiya and Mazumder, Rahul},
  journal = {arXiv preprint arXiv:2309.01885},
  year = {2023}
}"""
    ),
    "qronos": (
        """@article{zhang2025qronos,
  title = {{Qronos}: Correcting the Past by Shaping the Future... in Post-Training Quantization},
  author = {Zhang, Shihao and Zhang, Haoyu and Colbert, Ian and Saab, Rayan},
  journal = {arXiv preprint arXiv:2505.11695},
  year = {2025}
}"""
    ),
    "gptaq": (
        """@inproceedings{li2025gptaq,
  title = {{GPTAQ}: Efficient Finetuning-Free Quantization for Asymmetric Calibration},
  author = {Li, Yuhang and Yin, Ruokai and Lee, Donghyun and Xiao, Shiting and Panda, Priyadarshini},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  note = {arXiv:2504.02692}
}"""
    ),
    "adaround": (
        """@inproceedings{nagel2020adaround,
  title = {Up or Down? {A}daptive Rounding for Post-Training Quantization},
  author = {Nagel, Markus and Amjad, Rana Ali and van Baalen, Mart and Louizos, Christos and Blankevoort, Tijmen},
  booktitle = {International Conference on Machine Learning},
  year = {2020},
  note = {arXiv:2004.10568}
}"""
    ),
    "brecq": (
        """@inproceedings{li2021brecq,
  title = {{BRECQ}: Pushing the Limit of Post-Training Quantization by Block Reconstruction},
  author = {Li, Yuhang and Gong, Ruihao and Tan, Xu and Yang, Yang and Hu, Peng and Zhang, Qi
            and Yu, Fengwei and Wang, Wei and Gu, Shi},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  note = {arXiv:2102.05426}
}"""
    ),
    "qdrop": (
        """@inproceedings{wei2022qdrop,
  title = {{QDrop}: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization},
  author = {Wei, Xiuying and Gong, Ruihao and Li, Yuhang and Liu, Xianglong and Yu, Fengwei},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  note = {arXiv:2203.05740}
}"""
    ),
    "hawqv2": (
        """@article{dong2019hawqv2,
  title = {{HAWQ-V2}: Hessian Aware trace-Weighted Quantization of Neural Networks},
  author = {Dong, Zhen and Yao, Zhewei and Cai, Yaohui and Arfeen, Daiyaan and Gholami, Amir
            and Mahoney, Michael W. and Keutzer, Kurt},
  journal = {arXiv preprint arXiv:1911.03852},
  year = {2019}
}"""
    ),
    "tdq": (
        """@inproceedings{so2023tdq,
  title = {Temporal Dynamic Quantization for Diffusion Models},
  author = {So, Junhyuk and Lee, Jungwon and Ahn, Daehyun and Kim, Hyungjun and Park, Eunhyeok},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  note = {arXiv:2306.02316}
}"""
    ),
    "taqdit": (
        """@article{liu2024taqdit,
  title = {{TaQ-DiT}: Time-aware Quantization for Diffusion Transformers},
  author = {Liu, Xinyan and Shi, Huihong and Xu, Yang and Wang, Zhongfeng},
  journal = {arXiv preprint arXiv:2411.14172},
  year = {2024}
}"""
    ),
    "smoothquant": (
        """@inproceedings{xiao2023smoothquant,
  title = {{SmoothQuant}: Accurate and Efficient Post-Training Quantization for Large Language Models},
  author = {Xiao, Guangxuan and Lin, Ji and Seznec, Mickael and Wu, Hao and Demouth, Julien and Han, Song},
  booktitle = {International Conference on Machine Learning},
  year = {2023},
  note = {arXiv:2211.10438}
}"""
    ),
    "ptq4dit": (
        """@inproceedings{wu2024ptq4dit,
  title = {{PTQ4DiT}: Post-training Quantization for Diffusion Transformers},
  author = {Wu, Junyi and Wang, Haoxuan and Shang, Yuzhang and Shah, Mubarak and Yan, Yan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2405.16005}
}"""
    ),
    "tcaq": (
        """@article{huang2024tcaqdm,
  title = {{TCAQ-DM}: Timestep-Channel Adaptive Quantization for Diffusion Models},
  author = {Huang, Haocheng and Chen, Jiaxin and Guo, Jinyang and Zhan, Ruiyi and Wang, Yunhong},
  journal = {arXiv preprint arXiv:2412.16700},
  year = {2024}
}"""
    ),
    "quarot": (
        """@inproceedings{ashkboos2024quarot,
  title = {{QuaRot}: Outlier-Free 4-Bit Inference in Rotated {LLM}s},
  author = {Ashkboos, Saleh and Mohtashami, Amirkeivan and Croci, Maximilian L. and Li, Bo and Cameron, Pashmina
            and Jaggi, Martin and Alistarh, Dan and Hoefler, Torsten and Hensman, James},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2404.00456}
}"""
    ),
    "svdquant": (
        """@inproceedings{li2025svdquant,
  title = {{SVDQuant}: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models},
  author = {Li, Muyang and Lin, Yujun and Zhang, Zhekai and Cai, Tianle and Li, Xiuyu and Guo, Junxian
            and Xie, Enze and Meng, Chenlin and Zhu, Jun-Yan and Han, Song},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2411.05007}
}"""
    ),
    "qera": (
        """@inproceedings{zhang2025qera,
  title = {{QERA}: an Analytical Framework for Quantization Error Reconstruction},
  author = {Zhang, Cheng and Wong, Jeffrey T. H. and Xiao, Can and Constantinides, George A. and Zhao, Yiren},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2410.06040}
}"""
    ),
    "stochastic-rounding": (
        """@inproceedings{gupta2015limited,
  title = {Deep Learning with Limited Numerical Precision},
  author = {Gupta, Suyog and Agrawal, Ankur and Gopalakrishnan, Kailash and Narayanan, Pritish},
  booktitle = {International Conference on Machine Learning},
  year = {2015},
  note = {arXiv:1502.02551}
}"""
    ),
    "bitnet": (
        """@article{ma2024bitnet,
  title = {The Era of 1-bit {LLM}s: All Large Language Models are in 1.58 Bits},
  author = {Ma, Shuming and Wang, Hongyu and Ma, Lingxiao and Wang, Lei and Wang, Wenhui and Huang, Shaohan
            and Dong, Li and Wang, Ruiping and Xue, Jilong and Wei, Furu},
  journal = {arXiv preprint arXiv:2402.17764},
  year = {2024}
}"""
    ),
}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A registered function; ``citation_key`` looks up its BibTeX in ``CITATIONS`` and is None for what nobody
    invented. ``cross`` says that it needs the cross moments with the full-precision model's inputs, ``over_time`` that
    it is about how inputs change with the noise level.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    citation_key: str | None
    summary: str
    cross: bool = False
    over_time: bool = False

    @property
    def damped(self) -> bool:
        """Whether it takes a damping."""
        return "damping" in signature(self.function).parameters


_METHODS: dict[tuple[str, str], Method] = {}


def register(
    kind: str, name: str, *, citation: str | None = None, summary: str, cross: bool = False, over_time: bool = False
) -> Callable[[Function], Function]:
    """Enter the decorated function under its kind and name; a mistake here is the programmer's and raises
    ValueError.
    """
    if kind not in KINDS:
        raise ValueError(f"method {name!r}: unknown kind {kind!r}, expected one of {KINDS}")
    if citation is not None and citation not in CITATIONS:
        raise ValueError(f"method {name!r}: no citation {citation!r} in CITATIONS")

    def enter(function: Function) -> Function:
        if (kind, name) in _METHODS:
            raise ValueError(f"two {kind} methods are called {name!r}")
        _METHODS[kind, name] = Method(name, kind, function, citation, summary, cross, over_time)
        return function

    return enter


@cache
def _load() -> None:
    for file in FILES:
        import_module(f"{__package__}.{file}")


def members(kind: str) -> tuple[Method, ...]:
    """All methods of a kind, by name."""
    _load()
    return tuple(method for (found, _), method in sorted(_METHODS.items()) if found == kind)


def get(kind: str, name: str) -> Method:
    """The method of this kind and name; raises RecipeError that lists the known ones."""
    known = {method.name: method for method in members(kind)}
    if name not in known:
        raise RecipeError(f"unknown {kind} method {name!r}; known: {', '.join(known) or 'none'}")
    return known[name]
