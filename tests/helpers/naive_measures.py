"""The measures by their definitions, with one sequence at a time, no cache and no library."""

import torch

VOCAB, EOS = 23, 1


@torch.no_grad()
def naive_greedy(model, ids, length):
    """Return up to ``length`` new tokens of greedy decoding, which ends after an EOS."""
    new = []
    while len(new) < length and EOS not in new:
        new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return new


@torch.no_grad()
def naive_scores(model, row):
    """Return the losses of a row's labelled tokens, and whether each is the argmax."""
    log_p = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    at = [i for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
    losses = [-log_p[i - 1, row["labels"][i]].item() for i in at]
    return losses, [log_p[i - 1].argmax().item() == row["labels"][i] for i in at]


def naive_extraction(model, row, n, stride):
    """Compute Eqs. 4 and 5 as they are written, with one generation for every prefix."""
    ids = row["input_ids"]
    start = next(i for i in range(1, len(ids)) if row["labels"][i] != -100)
    overlaps = []
    for t in range(start, len(ids) - n, stride):
        new = naive_greedy(model, ids[:t], len(ids) - t)
        truth = {tuple(ids[i : i + n]) for i in range(t, len(ids) - n + 1)}
        grams = [tuple(new[i : i + n]) for i in range(len(new) - n + 1)]
        overlaps.append(sum(g in truth for g in grams) / len(grams) if grams else 0.0)
    return sum(overlaps) / len(overlaps) if overlaps else None
