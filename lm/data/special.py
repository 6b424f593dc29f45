"""Special tokens: what the classes of transformers call them, and their ids."""

# In the order in which transformers appends those that a vocabulary lacks.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OF_BERT = dict(zip(NAMES[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True))
OF_ROBERTA = dict(zip(NAMES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True))
OF_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
OF_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def add_special(tokenizer, settings, defaults):
    """The special tokens that the folder or else the class names; those that the vocabulary lacks get the next ids."""
    from tokenizers import AddedToken

    listed = sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    values = [value for _, value in listed]
    named = [settings.get(name, defaults.get(name)) for name in NAMES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = settings.get(key) or []
        named += list(extra.values()) if isinstance(extra, dict) else list(extra)
    known = {_content(value) for value in values}
    for value in named:
        if value is not None and _content(value) not in known:
            known.add(_content(value))
            values.append(value if isinstance(value, dict) else {"content": value})
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    for value in values:
        given = {flag: value[flag] for flag in flags if flag in value}
        token = AddedToken(value["content"], special=value.get("special", True), **given)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def name_of(settings, defaults, name="unk_token"):
    return _content(settings.get(name) or defaults[name])


def _content(value):
    return value["content"] if isinstance(value, dict) else value
