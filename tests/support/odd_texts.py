"""Prompts of all kinds, to compare tokenizers on."""

import random
import unicodedata
from itertools import pairwise

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
ODD = [
    "", " ", "\n\t ", "the cat", "The  CAT\n\n sat\ton   it ", "café cafe\u0301 CAFÉ", "naïve ﬁne ½ ① ＦＵＬＬ",
    "emoji 😀 👩\u200d👩\u200d👧 🇩🇪 cat", "日本語のテキスト, 한국어, العربية, עברית", "a\u00a0b\u3000c\u200bd",
    "don't I'll we've she's it'd they're I'm", "wow!!! really?! a!b !", "1234 5.6e-7 x86_64", "tab\x00nul\x07",
    "under_score (((very:1.3))), [a|b], <lora:x>", f"{END} in {BEGIN} the text{END}", f"{END.upper()} loud",
    "a</s>b <extra_id_3> c<pad>d <unk> <extra_id_99>", "▁x ▁ y", "\u0130stanbul \u00df \u1e9e",
    "the cat " * 60, "é" * 200, "x" * 300, "a\u0301\u0328\u0301 e\u0301",
]  # fmt: skip


def odd_texts(count=300, seed=0):
    """``ODD``, and words and signs of many scripts put together at random."""
    draw = random.Random(seed)
    pieces = [
        *" ".join(ODD[3:18]).split(),
        *"!?.,;:'\"()[]<>|/\\-_ \t\n",
        "é",
        "e\u0301",
        "ß",
        "Ω",
        "я",
        "中",
        "가",
        "😀",
    ]
    pieces += [END, "</s>", *(chr(draw.randrange(0x20, 0x2FFF)) for _ in range(300))]
    return [*ODD, *("".join(draw.choices([*pieces, " "], k=draw.randrange(30))) for _ in range(count))]


def has_stacked_marks(text):
    """Whether a letter has two combining marks: sentencepiece, with which T5 was trained, composes it with the first,
    transformers 5 does not.
    """
    marks = [unicodedata.category(letter) == "Mn" for letter in text]
    return any(a and b for a, b in pairwise(marks))
