"""The miniature's words: a closed vocabulary, one token a word, one token a letter inside straight double quotes."""

from __future__ import annotations

from flowopd_eval.prompts import plural
from flowopd_eval.tiny.scenes import COLOURS, NUMBERS, PLACES, SHAPES

TEXT_LENGTH = 16  # tokens a prompt, begin and end included
PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<bos>", "<eos>"
# A word; or, while exactly one quote is still to come, a single letter; or any other mark.
TOKEN_PATTERN = r'[a-z0-9](?=[^"]*"[^"]*$)|[a-z]+|[^\s]'


def words() -> list[str]:
    """Every token of the vocabulary, in id order."""
    caption = "a an photo picture drawing of and on left right above below sign that says".split()
    nouns = [form for shape in SHAPES for form in (shape, plural(shape))]
    letters = [chr(code) for code in range(ord("b"), ord("z") + 1)]  # "a" is there already
    return [PAD, UNKNOWN, BEGIN, END, *caption, *NUMBERS.values(), *nouns, *COLOURS, *PLACES, '"', *letters]


def build_tokenizer():  # noqa: ANN201  (a heavy type, imported late)
    """The tokenizer as transformers' ``PreTrainedTokenizerFast``: lower case, padded and cut to :data:`TEXT_LENGTH`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, vocabulary[BEGIN]), (END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=TEXT_LENGTH,
    )
