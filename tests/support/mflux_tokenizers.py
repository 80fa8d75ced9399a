"""Small tokenizers of the kinds that models of mflux have: every character, or byte, is a token."""

from string import printable

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def signs():
    """The character that stands for each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def clip():
    """514 tokens; the last one, with the largest number, ends a text, as CLIP's encoder expects."""
    from transformers import CLIPTokenizer

    tokens = [*signs(), *(f"{sign}</w>" for sign in signs()), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def t5():
    from transformers import T5Tokenizer

    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokens += [(letter, -3.0) for letter in printable if not letter.isspace()]
    return T5Tokenizer(vocab=tokens, extra_ids=0)


def qwen():
    """259 tokens, and the chat template of Qwen."""
    from transformers import Qwen2Tokenizer

    tokens = [*signs(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


KINDS = {"CLIPTokenizer": clip, "T5Tokenizer": t5}


def write_tokenizers(definitions, folder):
    """Writes what a model's definitions of tokenizers name, each to its folder; beside that of a processor what it does
    to pictures.
    """
    for definition in definitions:
        place = folder / definition.hf_subdir
        KINDS.get(definition.tokenizer_class, qwen)().save_pretrained(place)
        if definition.hf_subdir == "processor":
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            Qwen2VLImageProcessorPil().save_pretrained(place)
