"""A plain judge of an exported folder: transformers' model and tokenizer, windows of one size side by side."""

import math

import torch


@torch.no_grad()
def perplexity_in_transformers(folder, text, context):
    """e to the mean of −ln p over all tokens of ``text``, BOS in front, each window starting afresh where the last
    ended (the token before it is the first that it sees)."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids[0] == model.config.bos_token_id
    nats = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(ids) - 1, context):
        window = torch.tensor([ids[start : start + context + 1]])
        logits = model(window[:, :-1]).logits.double()
        nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum")
    return math.exp(nats / (len(ids) - 1))
